"""`saeguard test` from the outside."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.project import run
from tests.policy.example import GOOD
from tests.policy_tools.test_test_cases import CASES


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start in a folder with one policy and its tests."""
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "p.yaml").write_text(GOOD)
    (tmp_path / "policies" / "p.test.yaml").write_text(CASES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")


def respell(old: str, new: str) -> None:
    """Change the test file."""
    path = Path("policies/p.test.yaml")
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


def test_pass(capsys: pytest.CaptureFixture[str]) -> None:
    """Every case has a row with its verdict and score."""
    assert run("test") == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["policy", "case", "verdict", "score"],
        ["unsafe-code.shell-injection", "shadow", "fires", "match", "1.50", "pass"],
        ["stays", "quiet", "no_match", "0.00", "pass"],
        ["2", "passed,", "0", "failed"],
    ]


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("first_token: 4", "first_token: 3", "first_token: found 4, expected 3"),
        ("matched_tokens: 2", "matched_tokens: 1", "matched_tokens: found 2, expected 1"),
        (
            "0.9x3 0\n",
            "0.9x2 0x2\n",
            "verdict: found no_match, expected match; first_token: found None, expected 4",
        ),
        ("prompt_tokens: 2", "prompt_tokens: 6", "verdict: found not_evaluated, expected match"),
    ],
)
def test_fail(capsys: pytest.CaptureFixture[str], old: str, new: str, complaint: str) -> None:
    """A verdict other than the expected one fails, with place and both values."""
    respell(old, new)

    assert run("policy", "test") == 1
    out = capsys.readouterr().out
    assert f"policies/p.test.yaml:4:1: error[test-failed]: fires: {complaint}" in out
    assert out.endswith("1 passed, 1 failed\n")


def test_bad_test_file(capsys: pytest.CaptureFixture[str]) -> None:
    """A mistake in a test file is told like one in a policy."""
    respell("expect: match", "expect: mach")

    assert run("test") == 2
    assert "p.test.yaml:9:13: error[not-allowed]" in capsys.readouterr().err


def test_bad_policy(capsys: pytest.CaptureFixture[str]) -> None:
    """Policies that cannot be read cannot be tested."""
    Path("policies/q.yaml").write_text("id: 12")

    assert run("test") == 2
    assert "q.yaml:1:5: error[wrong-type]" in capsys.readouterr().err


def test_missing_tests(capsys: pytest.CaptureFixture[str]) -> None:
    """A policy without tests is an error only where that is asked for."""
    Path("policies/p.test.yaml").unlink()

    assert run("test") == 0
    assert run("test", "--require-tests") == 1
    assert (
        "policies/p.yaml: error[test-missing]: the policy has no tests; write p.test.yaml beside it"
    ) in capsys.readouterr().out


def test_orphan(capsys: pytest.CaptureFixture[str]) -> None:
    """A test file whose policy was renamed is told, since it would never run."""
    Path("policies/p.test.yaml").rename("policies/q.test.yaml")

    assert run("test") == 1
    assert "q.test.yaml: error[test-orphan]" in capsys.readouterr().out


def test_by_test_file(capsys: pytest.CaptureFixture[str]) -> None:
    """The path may be that of the test file."""
    assert run("test", "policies/p.test.yaml") == 0
    assert "2 passed, 0 failed" in capsys.readouterr().out


def test_names_are_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    """Square brackets in a name are printed as they are."""
    respell("name: fires", 'name: "[red]fires[/red]"')

    assert run("test") == 0
    assert "[red]fires[/red]" in capsys.readouterr().out
