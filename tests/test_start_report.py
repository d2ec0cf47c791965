"""A server's start ends in one box: what it watches and costs, or why it did not start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from saeguard import start_report
from saeguard.errors import InputError
from saeguard.vllm import patches

ABOUT = {"watches": "3 policies", "events": "/var/log/events.jsonl", "edits": "are taken up"}
COST = {"layers": [18], "held_mib": 1.5, "pass_us": 20.4, "pass_rows": 128}


@pytest.fixture(autouse=True)
def _begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(start_report.VARIABLE, "")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    start_report.begin(ABOUT)


def test_ready(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The ranks' costs are added up; the second server to answer says nothing."""
    start_report.rank_ready(COST)
    [folder] = tmp_path.iterdir()
    other = COST | {"layers": [20], "pass_us": 31.0}
    (folder / "rank-0.json").write_text(json.dumps(other))

    start_report.show_ready("http://0.0.0.0:8000")
    start_report.show_ready("http://0.0.0.0:8000")
    start_report.show_error()

    said = capfd.readouterr().err
    assert said.count("saeguard is ready") == 1
    assert "3 policies, at layer 18, 20" in said
    assert "3.00 MiB, 31 microseconds" in said
    assert "/var/log/events.jsonl" in said
    assert "http://0.0.0.0:8000" in said
    assert list(tmp_path.iterdir()) == []


def test_the_first_error_is_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What follows from it in other processes is not."""
    start_report.failed(InputError("p.yaml:3:1: error[x]: the cause"))
    start_report.failed(InputError("a consequence"))
    start_report.show_error()

    said = capfd.readouterr().err
    assert "the server did not start" in said
    assert "p.yaml:3:1: error[x]: the cause" in said
    assert "consequence" not in said
    assert list(tmp_path.iterdir()) == []


def test_an_error_after_the_start_is_not_one_of_the_start(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A request that is refused while serving leaves nothing for the end."""
    start_report.show_ready("http://0.0.0.0:8000")
    start_report.failed(InputError("refused"))
    start_report.show_error()

    assert "refused" not in capfd.readouterr().err


def test_errors_of_patches_are_reported(capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever the guard refuses inside vLLM, in whichever process."""

    def wrapper(_original: patches.Original, _instance: object) -> None:
        raise InputError("the guard refuses")

    with pytest.raises(InputError):
        patches._around(wrapper, ())(lambda: None, None, (), {})
    start_report.show_error()

    assert "the guard refuses" in capfd.readouterr().err


def test_without_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under `vllm serve` there is no folder, and nothing happens."""
    monkeypatch.delenv(start_report.VARIABLE)
    start_report.rank_ready(COST)
    start_report.failed(InputError("x"))
    start_report.show_ready("")
    start_report.show_error()
    assert not start_report.is_server()


@pytest.mark.parametrize("end", ["raise RuntimeError('vLLM')", "os.kill(os.getpid(), 15)"])
def test_the_error_is_the_last_thing_printed(tmp_path: Path, end: str) -> None:
    """After vLLM's traceback, and also if a signal ends the server."""
    code = f"""
import os, time
from saeguard import start_report
from saeguard.errors import InputError
from saeguard.vllm.api_server import ready
start_report.begin({ABOUT!r})
ready.attend()
start_report.failed(InputError("the cause"))
{end}
time.sleep(30)
"""
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == (1 if "raise" in end else 143)
    *_, title, cause, _ = done.stderr.splitlines()
    assert "the server did not start" in title
    assert "the cause" in cause
