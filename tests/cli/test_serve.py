"""`saeguard serve` refuses, before vLLM starts, what would be guarded wrongly."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from saeguard import start_report
from saeguard.cli import serve
from saeguard.cli.serve_checks import startup_report
from saeguard.policy import signing_keys
from tests import models
from tests.cli.project import plain, run


@pytest.mark.parametrize(
    "options",
    [
        ["--chat-template", "x.jinja"],
        ["--dtype", "float32", "--chat_template=x.jinja"],
        ["--trust-request-chat-template"],
    ],
)
def test_another_chat_template_and_a_role(tmp_path: Path, options: list[str]) -> None:
    """Roles found by one template and written by another would be wrong."""
    guarded = models.make_guarded(tmp_path)
    settings = {"policies": str(guarded.policies), "feature_sets": str(guarded.feature_sets)}
    plain = startup_report(settings, options)
    models.write_policy(
        guarded.policies / "r.yaml",
        id="by.role",
        scope="user",
        detect={"a": {"feature": "f0", "above": 0.5}},
        condition="a",
    )
    with pytest.raises(ValueError, match="tokenizer's own chat template") as caught:
        startup_report(settings, options)
    assert "r.yaml has `scope: user`" in str(caught.value)
    assert len(startup_report(settings, ["--dtype", "float32"])) == len(plain) + 1


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lay out a guarded model and return where the commands that start vLLM are noted."""
    models.make_guarded(tmp_path)
    for mode in ("shadow", "enforce"):
        models.write_policy(
            tmp_path / "policies" / f"{mode}.yaml", id=f"in.{mode}", mode=mode, action="flag",
            on_error="allow", detect={"a": {"feature": "f0", "above": 0.5}}, condition="a",
        )  # fmt: skip
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "key.pub").write_bytes(signing_keys.keygen()[1])
    commands: list[str] = []
    monkeypatch.setattr(os, "execv", lambda _, command: commands.append(" ".join(command)))
    monkeypatch.setattr(serve, "preflight", lambda _: None)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv(start_report.VARIABLE, "")  # which the command sets for the server
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return commands


SERVE = ("serve", "model", "--policies", "policies", "--feature-sets", "feature_sets")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--events gone/e.jsonl", "--events: gone: there is no such folder; make it, or name"),
        (
            "--events empty",
            "expected a file, found a folder; name a file in it, such as empty/events",
        ),
        (
            "--watch-capacity -5",
            "--watch-capacity: expected a number of encoder rows from 1, got",
        ),
        ("--watch-capacity 1", "hold 1: watch fewer, or set --watch-capacity and start"),
        ("--request-may-enforce x", "--request-may-enforce: no policy has the id x; loaded: in.e"),
        (
            "--request-may-enforce in.enforce",
            "in.enforce is enforced for every request already; leave it out, or name a policy in",
        ),
        (
            "--policies empty",
            "--policies: empty: the folder holds no policy file (NAME.yaml); write",
        ),
        (
            "--policies gone",
            "--policies: gone: there is no such file or folder; name a policy file",
        ),
        (
            "--feature-sets gone",
            "--feature-sets: gone: there is no such folder; give the folder of",
        ),
        ("--state file", "--state: file: expected a folder, found a file"),
        ("--access gone", "--access: gone: there is no such file; name an existing file"),
        ("--verify gone --state empty", "--verify: gone: there is no such file"),
        ("--verify file", "--verify needs --state, a folder that keeps the highest revision"),
        (
            "--additional-config {} --additional-config={}",
            "found 2 times; give it once, as one JSON",
        ),
        (
            "--verify key.pub --state empty",
            "policies/saeguard.bundle.json: there is no such file",
        ),
        ("--model other", "--model: found other, but the first argument names the model model"),
        ("--model=other", "--model: found other, but the first argument names the model model"),
    ],
)
def test_wrong_values_are_told_at_once(
    started: list[str], capsys: pytest.CaptureFixture[str], options: str, says: str
) -> None:
    """Before vLLM starts: the option, what was found, and what to do."""
    assert run(*SERVE, *options.split()) == 2
    assert says in plain(capsys.readouterr().err)
    assert started == []


def test_right_values_start(started: list[str]) -> None:
    """The same options with values that can be used go to the server."""
    assert run(
        *SERVE, "--events", "empty/events.jsonl", "--watch-capacity", "40", "--state", "new",
        "--request-may-enforce", "in.shadow", "--additional-config", '{"a": 1}',
    ) == 0  # fmt: skip
    [command] = started
    assert '"watch_capacity": 40' in command
    assert '"request_may_enforce": ["in.shadow"]' in command


def test_a_missing_model_is_told_at_once(
    started: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A path that leads nowhere; a name of the hub may be anything."""
    assert run("serve", "./gone", "--policies", "policies") == 2
    assert "MODEL: ./gone: there is no such folder" in plain(capsys.readouterr().err)
    assert not started
