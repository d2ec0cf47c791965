"""`saeguard policy diff` from the outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scipy.stats import binomtest

from tests.cli.project import BOTH, ONE, lay_out, record, run

TEXTS = {
    "quiet": ([0, 0, 0.1, 0.2], [0] * 4),
    "weak": ([0, 0, 0.5, 0.5], [0] * 4),
    "strong": ([0, 0, 0.9, 0.9], [0] * 4),
}


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start with one policy, a stricter version of it, and three recorded texts."""
    lay_out(tmp_path, ONE)
    monkeypatch.chdir(tmp_path)
    Path("new").mkdir()
    Path("new/p.yaml").write_text(ONE.replace("above: 0.6", "above: 0.4"))
    record(Path("r.safetensors"), TEXTS)


def test_same(capsys: pytest.CaptureFixture[str]) -> None:
    """Comments and layout are no change."""
    Path("new/p.yaml").write_text("# moved\n" + ONE)

    assert run("policy", "diff", "policies", "new", "--corpus", "r.safetensors") == 0
    assert capsys.readouterr().out == (
        "no policy has changed\n\n0 of 3 texts would change: 0.00% (95 %: 0.00% to 70.76%)\n"
    )


def test_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    """The key that changed, the text that changes, and the rate with its exact interval."""
    assert run("policy", "diff", "policies", "new", "--corpus", "r.safetensors") == 0
    interval = binomtest(1, 3).proportion_ci(method="exact")
    assert capsys.readouterr().out == (
        "changed  unsafe-code.shell-injection shadow\n"
        "    detect.shell.above  0.6 -> 0.4  (verdict)\n"
        "\n"
        f"1 of 3 texts would change: 33.33% (95 %: {interval.low:.2%} to {interval.high:.2%})\n"
        "  unsafe-code.shell-injection shadow: no_match -> match: 1 text: weak\n"
    )


@pytest.mark.parametrize(("budget", "code", "says"), [("0.4", 0, "within"), ("0.3", 1, "above")])
def test_budget(capsys: pytest.CaptureFixture[str], budget: str, code: int, says: str) -> None:
    """A rate above the budget fails; one at or below it does not."""
    corpus = ["--corpus", "r.safetensors"]
    assert run("policy", "diff", "policies", "new", *corpus, "--budget", budget) == code
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{says} the budget of ")


def test_action(capsys: pytest.CaptureFixture[str]) -> None:
    """What is done counts as a change where no verdict does."""
    Path("new/p.yaml").write_text(ONE.replace("mode: shadow", "mode: enforce"))

    assert run("policy", "diff", "policies", "new", "--corpus", "r.safetensors") == 0
    out = capsys.readouterr().out
    assert "    mode  shadow -> enforce  (action)" in out
    assert "  done: nothing -> flag: 1 text: strong" in out


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    """`--format json` names every text with its scores."""
    assert (
        run("policy", "diff", "policies", "new", "--corpus", "r.safetensors", "--format", "json")
        == 0
    )
    report = json.loads(capsys.readouterr().out)
    [request] = report["corpus"]["requests"]
    assert request["request"] == "weak"
    [verdict] = request["verdicts"]
    assert (verdict["old"], verdict["new"], verdict["first_token"]) == ("no_match", "match", 2)
    assert verdict["old_score"] == pytest.approx(0.5 / 0.6)
    assert verdict["new_score"] == pytest.approx(0.5 / 0.4)


def test_added_and_removed(capsys: pytest.CaptureFixture[str]) -> None:
    """A policy that comes or goes changes the texts that it matches."""
    Path("new/p.yaml").unlink()
    Path("new/q.yaml").write_text(BOTH.replace("id: unsafe", "id: other"))

    assert run("policy", "diff", "policies", "new", "--corpus", "r.safetensors") == 0
    out = capsys.readouterr().out
    assert "added    other-code.shell-injection shadow\n" in out
    assert "removed  unsafe-code.shell-injection shadow\n" in out
    assert "unsafe-code.shell-injection shadow: match -> absent: 1 text: strong" in out


def test_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    """Texts without a model, a budget without a corpus and a broken file have code 2."""
    Path("t.jsonl").write_text("{}")
    assert run("policy", "diff", "policies", "new", "--corpus", "t.jsonl") == 2
    assert "give the --model that reads them" in capsys.readouterr().err
    assert run("policy", "diff", "policies", "new", "--budget", "0.1") == 2
    Path("new/p.yaml").write_text("id: 12")
    assert run("policy", "diff", "policies", "new") == 2
    assert "new/p.yaml:1:5: error[wrong-type]" in capsys.readouterr().err


def test_another_definition(capsys: pytest.CaptureFixture[str]) -> None:
    """A recording of other latents is refused rather than judged."""
    path = Path("feature_sets/demo/unsafe-code.yaml")
    path.write_text(path.read_text().replace("detect: {3: 1.0}", "detect: {5: 1.0}"))

    assert run("policy", "diff", "policies", "new", "--corpus", "r.safetensors") == 2
    assert "was made of other latents" in capsys.readouterr().err


def test_another_range(capsys: pytest.CaptureFixture[str]) -> None:
    """A new calibration is judged on the old recording: it holds values, not shares."""
    path = Path("feature_sets/demo/unsafe-code.yaml")
    path.write_text(path.read_text().replace("high: 2.0", "high: 1.25", 1))

    assert run("policy", "diff", "policies", "new", "--corpus", "r.safetensors") == 0
    assert "0 of 3 texts would change" in capsys.readouterr().out  # 0.5 is 0.8 now
