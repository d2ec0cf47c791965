"""`saeguard test` on recordings and texts, to-do cases, JUnit, and a budget on ordinary texts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from tests.cli.project import ONE, lay_out, record, run
from tests.fixture import project

HEAD = "schema: saeguard.test/v1\npolicy: unsafe-code.shell-injection\ncases:\n"
TRACES = """\
  - {name: fires, prompt_tokens: 0, shares: {shell_exec: 0.9x4}, expect: match}
  - {name: quiet, prompt_tokens: 0, shares: {shell_exec: 0.1x4}, expect: no_match}
"""
TEXTS = {"loud": ([0, 0, 0.9, 0], [0] * 4), "calm": ([0, 0, 0.1, 0], [0] * 4)}


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start with one policy and a recording beside it."""
    lay_out(tmp_path, ONE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    record(Path("policies/p.safetensors"), TEXTS)


def cases(*more: str) -> None:
    """Write the test file."""
    Path("policies/p.test.yaml").write_text(HEAD + TRACES + "".join(f"  - {m}\n" for m in more))


def recorded(text: str, expect: str, more: str = "") -> str:
    """Return a case on a recorded text."""
    given = f"recording: p.safetensors, recorded_text: {text}"
    return f"{{name: the {text} one, {given}, expect: {expect}{more}}}"


def test_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    """Recorded texts are judged with today's feature set."""
    cases(recorded("loud", "match", ", first_token: 2"), recorded("calm", "no_match"))

    assert run("test") == 0
    out = capsys.readouterr().out
    assert "the loud one  match     1.50   pass" in out
    assert out.endswith("4 passed, 0 failed\n")


def test_recorded_and_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    """A case that cannot be judged fails; it is never passed over."""
    cases(recorded("loud", "no_match"), recorded("gone", "match"))

    assert run("test") == 1
    out = capsys.readouterr().out
    assert (
        "p.test.yaml:6:1: error[test-failed]: the loud one: verdict: found match, expected no_match"
    ) in out
    assert "it first matches at token 2: shell is 0.9, above 0.6: holds" in out
    assert "the gone one: policies/p.safetensors: there is no text 'gone'" in out
    assert out.endswith("2 passed, 2 failed\n")

    assert run("test", "--feature-sets", "nowhere") == 2
    assert "nowhere" in capsys.readouterr().err

    Path("feature_sets").rename("elsewhere")  # the folder that nobody named may be absent
    assert run("test") == 1
    assert "no folder of feature sets to judge it with" in capsys.readouterr().out


def test_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    """A case that is to do may fail, and is told once it passes."""
    cases(
        recorded("loud", "no_match", ", todo: true"), recorded("calm", "no_match", ", todo: true")
    )

    assert run("test") == 0
    out = capsys.readouterr().out
    assert "p.test.yaml:7:1: note[test-passes]: the calm one: the case passes now" in out
    assert out.endswith("2 passed, 0 failed, 1 to do, 1 to do, but passing\n")


def test_texts_need_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a model, texts are skipped and counted, not passed."""
    cases("{name: said, prompt: hi, completion: rm, expect: match}")

    assert run("test") == 0
    assert capsys.readouterr().out.endswith("2 passed, 0 failed, 1 skipped (give --model)\n")

    assert run("test", "--model", "nowhere") == 2
    assert "--model: nowhere: there is no such folder" in capsys.readouterr().err


def test_junit(capsys: pytest.CaptureFixture[str]) -> None:
    """JUnit XML says of each case what became of it, whatever its name."""
    cases(
        recorded("loud", "no_match"),
        recorded("calm", "match", ", todo: true"),
        "{name: '<said> & \"done\"', prompt: hi, expect: match}",
    )

    assert run("test", "--junit", "out/junit.xml") == 1
    capsys.readouterr()

    [suite] = ET.parse("out/junit.xml").getroot()  # noqa: S314 - written just now
    counts = {key: suite.get(key) for key in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": "5", "failures": "1", "errors": "0", "skipped": "2"}
    assert [(c.get("name"), [e.tag for e in c]) for c in suite] == [
        ("fires", []),
        ("quiet", []),
        ("the loud one", ["failure"]),
        ("the calm one", ["skipped"]),
        ('<said> & "done"', ["skipped"]),
    ]
    assert {c.get("classname") for c in suite} == {"unsafe-code.shell-injection"}


@pytest.mark.parametrize("format_", ["json", "github", "sarif"])
def test_formats(capsys: pytest.CaptureFixture[str], format_: str) -> None:
    """Failures are findings like those of `check`."""
    cases(recorded("loud", "no_match"))

    assert run("test", "--format", format_) == 1
    out = capsys.readouterr().out
    assert "the loud one: verdict: found match, expected no_match" in out
    assert "passed" not in out


@pytest.mark.parametrize(("budget", "code"), [("0.4", 1), ("0.5", 0)])
def test_budget(capsys: pytest.CaptureFixture[str], budget: str, code: int) -> None:
    """Ordinary texts may match up to the budget, and those that do are named."""
    cases()

    benign = ["--benign", "policies/p.safetensors", "--budget", budget]
    assert run("test", *benign) == code
    out = capsys.readouterr().out
    assert "1 of 2  50.00%  1.26% to 98.74%" in out
    named = "p.yaml: error[test-failed]: matches 1 of 2 ordinary texts (50.00%), the budget is"
    assert (named in out) == bool(code)
    assert ("or look at: loud" in out) == bool(code)


def test_texts_of_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model reads texts, `record` keeps its features, and all tiers agree with `scan`."""
    root = tmp_path / "own"
    project.save_project(root)
    monkeypatch.chdir(root)
    project.save_texts(Path("texts.jsonl"))
    model = ["--model", "model"]
    policy = Path("policies/unsafe-code/shell-command.yaml")
    recording = policy.with_name("kept.safetensors")
    assert run("policy", "record", "texts.jsonl", *model, "--out", str(recording)) == 0
    out = capsys.readouterr().out
    assert re.search(r"^2 texts, \d+ tokens, 3 features written to ", out, re.MULTILINE), out

    def given(text: dict[str, Any]) -> str:
        messages, completion = json.dumps(text["prompt"]), json.dumps(text["completion"])
        return f"messages: {messages}, completion: {completion}"

    fires, twin = project.TEXTS
    at = project.FIRES_AT
    policy.with_suffix(".test.yaml").write_text(
        "schema: saeguard.test/v1\npolicy: unsafe-code.shell-command\ncases:\n"
        f"  - {{name: text that fires, {given(fires)}, expect: match, first_token: {at}}}\n"
        f"  - {{name: quiet text, {given(twin)}, expect: no_match}}\n"
        f"  - {{name: kept, recording: {recording.name}, recorded_text: {fires['id']}, "
        f"expect: match, first_token: {at}}}\n"
        f"  - {{name: kept and quiet, recording: {recording.name}, recorded_text: {twin['id']}, "
        "expect: no_match}\n"
    )
    assert run("test", str(policy), *model) == 0
    assert capsys.readouterr().out.endswith("4 passed, 0 failed\n")

    arguments = ["texts.jsonl", *model, "--policies", str(policy)]
    assert run("scan", *arguments, "--out", "scan.jsonl") == 0
    capsys.readouterr()
    expected = [json.loads(line) for line in Path("scan.jsonl").read_text().splitlines()]
    assert [line["verdict"] for line in expected] == ["match", "no_match"]
    assert run("policy", "explain", str(policy), str(recording), "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert [(t["verdict"], t["first_token"]) for t in told] == [
        (e["verdict"], e["first_token"]) for e in expected
    ]
    assert [t["score"] for t in told] == pytest.approx([e["score"] for e in expected], rel=1e-5)


def test_the_fixtures_own_cases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What tests/fixture says of its model holds, and would be reported if it did not."""
    project.save_project(tmp_path / "own")
    monkeypatch.chdir(tmp_path / "own")
    assert run("check", "--strict", "--require-tests") == 0
    capsys.readouterr()
    assert run("test", "--require-tests", "--model", "model") == 0
    assert capsys.readouterr().out.endswith("8 passed, 0 failed\n")
    cases = Path("policies/unsafe-code/shell-command.test.yaml")
    cases.write_text(cases.read_text().replace("os.system(cmd)", "os.popen(cmd)"))
    assert run("test", "--model", "model") == 1
    assert "verdict: found no_match, expected match" in capsys.readouterr().out
