"""Commands that a page shows exist: targets of make, verbs and options, modules, addresses."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from saeguard.cli import VERBS, build, load
from saeguard.urls import DOCS
from saeguard.vllm.settings import Settings
from tests.test_pages import PAGES, ROOT

FENCE = re.compile(r"^ *```(?:sh|console|bash|text)?\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`((?:make|saeguard|python -m) [^`]+)`")
STARTS = re.compile(r"^(?:\$ )?(?:[A-Z_]+=\S* )*(?:\S*/)?(make|saeguard|python3?) (.*)$")
TARGETS = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
URLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
OURS = re.compile(r"https://github\.com/[\w-]+/saeguard\b")


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the program and its words, of each command in a page's code."""
    content = (ROOT / page).read_text().replace("\\\n", " ")
    lines = [line for block in FENCE.findall(content) for line in block.splitlines()]
    lines += INLINE.findall(content)
    for line in lines:
        found = STARTS.match(line.strip())
        if found:
            try:
                words = shlex.split(found[2], comments=True)
            except ValueError:  # prose that looks like a command
                continue
            yield found[1], list(_until_shell(words))


def _until_shell(words: list[str]) -> Iterator[str]:
    for word in words:
        if word in {"|", "&&", ";", ">"} or word.startswith(("2>", ">")):
            return
        yield word


@cache
def command(verb: str) -> Any:
    """Return the click command of a verb; of the whole command line, without its verbs, for ""."""
    return load(verb) if verb else typer.main.get_command(build())


def complaint(words: list[str]) -> str:
    """Return what of a `saeguard` command does not exist, empty if all does."""
    here = command("")
    for word in words:
        name = word.split("=")[0]
        if word.startswith("-"):
            options = {o for p in here.params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
            others = here.context_settings.get("ignore_unknown_options", False)  # vLLM's, of serve
            if name not in options and not others and len(word) > 1:
                return f"no option {name}"
        elif hasattr(here, "commands"):
            if word not in (VERBS if here is command("") else here.commands):
                return f"no verb {word}"
            here = command(word) if here is command("") else here.commands[word]
    return ""


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_exist(page: Path) -> None:
    """`make` has the target, `saeguard` the verb and its options, Python the module."""
    wrong = []
    for program, words in commands(page):
        if program == "make":
            targets = [word for word in words if not word.startswith("-") and "=" not in word]
            wrong += [f"make {word}" for word in targets if word not in TARGETS]
        elif program == "saeguard":
            if why := complaint(words):
                wrong.append(f"saeguard {' '.join(words)}: {why}")
        elif words[:1] == ["-m"] and words[1].split(".")[0] in {"tests", "benchmarks", "demo"}:
            path = ROOT / words[1].replace(".", "/")
            there = path.with_suffix(".py").exists() or (path / "__main__.py").exists()
            if not there and not path.name.isupper():  # NAME stands for any
                wrong.append(f"python -m {words[1]}")
    assert wrong == []


def test_the_project_has_one_address() -> None:
    """Pages, forms and error messages repeat the addresses of `pyproject.toml`."""
    files = [*(ROOT / page for page in PAGES), *ROOT.glob(".github/**/*.yml")]
    other = {u for file in files for u in OURS.findall(file.read_text()) if u != URLS["Repository"]}

    assert other == set()
    assert URLS["Documentation"].rstrip("/") == DOCS


def test_nightly_runs_what_make_nightly_does() -> None:
    """The workflow has a job for each part of `make nightly`."""
    parts = re.findall(r"^nightly: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    workflow = (ROOT / ".github/workflows/nightly.yml").read_text()

    assert [part.split() for part in parts] == [
        re.findall(r"target: \[(.+)\]", workflow)[0].split(", ")
    ]


def test_every_setting_has_a_row() -> None:
    """The table of docs/serving.md lists the operator's settings, not those of commands."""
    rows = re.findall(
        r"^\| (?:`--[\w-]+` )?\| `(\w+)` \|", (ROOT / "docs/serving.md").read_text(), re.MULTILINE
    )

    assert sorted(rows) == sorted(set(Settings.model_fields) - {"graph", "read"})


def test_wrong_commands_are_found() -> None:
    """The checks above see what does not exist."""
    assert complaint(["check", "policies"]) == ""
    assert complaint(["policy", "diff", "a", "b", "--corpus", "c"]) == ""
    assert complaint(["serve", "m", "--policies", "p", "--max-model-len", "9"]) == ""
    assert complaint(["chek", "policies"]) == "no verb chek"
    assert complaint(["policy", "dif"]) == "no verb dif"
    assert complaint(["check", "policies", "--strikt"]) == "no option --strikt"
    assert sum(1 for page in PAGES for _ in commands(page)) > 80
