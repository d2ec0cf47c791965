"""`saeguard --version`, and what a shell offers to complete; verbs are loaded only when named."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from saeguard import __version__
from saeguard.cli import VERBS, load
from tests.cli.project import run


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("saeguard pol", {"policy"}),
        ("saeguard s", {"serve", "scan", "sae"}),
        ("saeguard --ver", {"--version"}),
        ("saeguard policy ex", {"explain"}),
        ("saeguard policy explain --comp", {"--completion"}),
        ("saeguard features calibrate --top", {"--topk"}),
        ("saeguard features search --scope o", {"output"}),
        ("saeguard sae inspect --l", {"--l0", "--latents", "--layer"}),
        ("saeguard scan --model gone --o", {"--out"}),
        ("saeguard serve --pol", {"--policies"}),
    ],
)
def test_bash_completes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    line: str,
    offered: set[str],
) -> None:
    """Verbs, their verbs, options and choices; a path that is wrong so far is no obstacle."""
    monkeypatch.setenv("_SAEGUARD_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split()) - 1))

    assert run() == 0

    assert set(capsys.readouterr().out.split()) == offered


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """Three lines for a bug report: saeguard, vLLM or that it is missing, Python."""
    assert run("--version") == 0

    ours, vllm, python = capsys.readouterr().out.splitlines()
    assert ours == f"saeguard {__version__}"
    assert re.fullmatch(r"vLLM (not found|\S+ \(package vllm(-cpu)?\))", vllm)
    assert python == f"Python {sys.version.split()[0]}"


def helps(command: Any) -> Iterator[str]:
    """Yield the help texts of a command, of its options and of its own verbs."""
    yield command.help or ""
    yield from (getattr(p, "help", None) or "" for p in command.params)
    for inner in getattr(command, "commands", {}).values():
        yield from helps(inner)


@pytest.mark.parametrize("verb", VERBS)
def test_help_loses_no_words(verb: str) -> None:
    """Help texts pass through Rich's markup, which takes a word in brackets for a style."""
    lost = [text for text in helps(load(verb)) if re.search(r"(?<!\\)\[/?[a-z@#]", text)]
    assert lost == []
