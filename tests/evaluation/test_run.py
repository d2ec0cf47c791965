"""The whole command on a tiny model: its verdicts are those of scan, and it goes on after a cut."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from saeguard.evaluation import judging
from saeguard.hf import scan
from saeguard.hf.readings import TransformersEngine
from tests.cli.project import run
from tests.evaluation.project import Project, lines, project

__all__ = ["project"]

QUICK = ("--no-length", "--no-words", "--no-probe")


def rows(report: dict[str, Any], dataset: str) -> dict[str, dict[str, Any]]:
    """Return the rows of a dataset by name."""
    (found,) = [d for d in report["datasets"] if d["name"] == dataset]
    return {f"{row['name']}|{row['reads']}": row for row in found["rows"]}


def scanned(project: Project, file: str) -> list[dict[str, Any]]:
    """Return what `saeguard scan` says of the texts in a file."""
    arguments = ["--policies", "policies/loud.yaml", "--model", "model", "--feature-sets", "sets"]
    assert run("scan", file, *arguments, "--out", "verdicts.jsonl") == 0
    content = (project.folder / "verdicts.jsonl").read_text()
    return [json.loads(line) for line in content.splitlines()]


def test_figures_are_those_of_scan(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    """AUROC, rates and counts follow from scan's scores; every baseline stands beside them."""
    report = project.report("--data", "data", "--benign", "benign", "--judge")
    verdicts = scanned(project, "data/letters.jsonl")
    label = np.array([line["label"] for line in lines(60)], bool)
    score = np.array([v["score"] for v in verdicts])
    match = np.array([v["verdict"] == "match" for v in verdicts])
    found = rows(report, "letters")
    row = found["noise.loud|output"]
    assert row["auroc"]["value"] == pytest.approx(roc_auc_score(label, score), abs=1e-6)
    assert np.trapezoid(*np.array(row["roc"]).T[::-1]) == pytest.approx(
        row["auroc"]["value"], abs=0.02
    )
    assert row["tpr"]["hits"] == match[label].sum()
    assert row["fpr"]["hits"] == match[~label].sum()
    assert row["verdicts"]["positives"]["match"] == match[label].sum()
    benign = [v["verdict"] == "match" for v in scanned(project, "benign/plain.jsonl")]
    assert report["policies"][0]["benign"]["rate"]["hits"] == sum(benign)
    assert report["policies"][0]["benign"]["rate"]["texts"] == 150
    assert set(found) == {
        "noise.loud|output",
        "noise.shrill|both",
        *(f"{name}|{part}" for name in ("length", "words") for part in ("output", "both")),
        *(
            f"probe, {name} token, layer 1|{part}"
            for name in ("mean", "last")
            for part in ("output", "both")
        ),
        "judge, noise.loud|output",
        "judge, noise.shrill|both",
    }
    only = rows(report, "only")["noise.loud|output"]
    assert (only["auroc"], only["fpr"], only["tpr"]["texts"], only["roc"]) == (None, None, 8, [])
    out = capsys.readouterr().out
    assert "positives only: no AUROC" in out
    assert "150 ordinary texts" in out


def test_page_is_whole(project: Project) -> None:
    """One file that loads nothing and runs nothing; texts from files are escaped."""
    rude = {"id": "<b>", "behaviour": "noise", "label": 1, "text": "<script>alert(1)</script>"}
    project.write("data/letters.jsonl", *lines(20), rude)
    arguments = ("--data", "data", "--benign", "benign", "--no-words", "--no-probe")
    assert project.evaluate(*arguments, "--html", "out.html", "--worst", "20") == 0
    page = (project.folder / "out.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in re.sub(r"</?span[^>]*>", "", page)
    assert not re.findall(r"""(?:src|href)=|url\(|@import|https?://""", page)
    assert page.count("<svg") > 8
    balanced(page)


def balanced(page: str) -> None:
    """Check that every element that needs an end has one."""
    open_: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, _attributes: object) -> None:
            if tag != "meta":
                open_.append(tag)

        def handle_startendtag(self, tag: str, _attributes: object) -> None:
            """It ends itself."""

        def handle_endtag(self, tag: str) -> None:
            assert open_.pop() == tag

    Reader().feed(page)
    assert open_ == []


def test_nothing_is_judged_twice(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --resume a second run reads only the worst texts again, and reports the same."""
    pair = ("--pair", "noise.*=letters", "--pair", "noise.shrill=only", "--no-words", "--judge")
    arguments = ("--data", "data", "--benign", "benign", *pair, "--resume", "scores")
    first = project.report(*arguments)
    read: list[int] = []
    see = scan.see

    def counted(lm: Any, watchlist: Any, texts: Any) -> Iterator[Any]:
        read.append(len(texts))
        return see(lm, watchlist, texts)

    monkeypatch.setattr(judging, "see", counted)
    second = project.report(*arguments)
    assert sum(read) < 40
    assert {**second, "made": first["made"]} == first
    policy = project.folder / "policies/loud.yaml"
    policy.write_text(policy.read_text().replace("0.5", "0.6"))
    read.clear()
    assert project.report(*arguments) != first
    assert sum(read) >= 60 + 8 + 150


def test_a_run_that_was_cut_off_goes_on(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was judged before the cut is kept, a chunk at a time."""
    monkeypatch.setattr(judging, "CHUNK", 16)
    whole = project.report("--data", "data/letters.jsonl", *QUICK)
    see, read = scan.see, []

    def cut(lm: Any, watchlist: Any, texts: Any) -> Iterator[Any]:
        if len(read) == 2:
            raise KeyboardInterrupt
        read.append(len(texts))
        return see(lm, watchlist, texts)

    monkeypatch.setattr(judging, "see", cut)
    assert project.evaluate("--data", "data/letters.jsonl", *QUICK, "--resume", "s") == 130
    assert sum(read) == 32
    left: list[int] = []

    def counted(lm: Any, watchlist: Any, texts: Any) -> Iterator[Any]:
        left.append(len(texts))
        return see(lm, watchlist, texts)

    monkeypatch.setattr(judging, "see", counted)
    again = project.report("--data", "data/letters.jsonl", *QUICK, "--resume", "s", "--worst", "0")
    assert sum(left) == 60 - 32
    mine, theirs = (rows(r, "letters")["noise.loud|output"] for r in (again, whole))
    assert {**mine, "worst": None} == {**theirs, "worst": None}


def test_errors_are_no_quiet_verdicts(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Texts with unreadable activations, or without a token in scope, leave every rate."""
    silent = {"id": "q", "behaviour": "noise", "label": 0, "prompt": "Say it.", "completion": ""}
    project.write("data/letters.jsonl", *lines(10), silent)
    record = scan.record

    def broken(lm: Any, texts: Any, layers: Any) -> Iterator[Any]:
        for i, residuals in record(lm, texts, layers):
            wrong = {layer: torch.full_like(x, torch.nan) for layer, x in residuals.items()}
            yield i, wrong if i == 4 else residuals

    monkeypatch.setattr(scan, "record", broken)
    report = project.report(
        "--data", "data/letters.jsonl", *QUICK, "--pair", "noise.loud=letters", "--html", "o.html"
    )
    row = rows(report, "letters")["noise.loud|output"]
    assert row["verdicts"]["positives"]["error"] == 1
    assert row["verdicts"]["negatives"]["not_evaluated"] == 1
    assert row["scored"] == {"positives": 4, "negatives": 5}
    assert (row["tpr"]["texts"], row["fpr"]["texts"]) == (4, 5)
    assert "1 not evaluated, 1 error" in capsys.readouterr().out
    assert "1 not evaluated, 1 error" in (project.folder / "o.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "data", "--pair", "loud"], "--pair: found 'loud', expected POLICY=DATASET"),
        ([], "no text to judge; give --data, --benign or both"),
        (["--data", "none"], "none: there is no such file or folder"),
        (["--data", "bad.jsonl"], "bad.jsonl:1: label: "),
        (
            ["--data", "data", "--resume", "bad.jsonl"],
            "--resume: bad.jsonl: file is not a database",
        ),
        (["--data", "data", "--pair", "x=letters"], "no policy is named 'x'"),
    ],
)
def test_wrong_input(
    project: Project, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    """Each mistake has a message and exit code 2, and no report is written."""
    project.write("bad.jsonl", {"id": "a", "text": "x", "label": "yes"})
    assert project.evaluate(*arguments, "--json", "out.json") == 2
    assert message in capsys.readouterr().err
    assert not (project.folder / "out.json").exists()


def test_ordinary_texts_alone(project: Project, tmp_path: Path) -> None:
    """Without labelled texts the report has the firing rate."""
    report = project.report("--benign", "benign")
    assert report["datasets"] == []
    assert report["policies"][0]["benign"]["rate"]["texts"] == 150
    assert tmp_path == project.folder


def test_an_engine_that_gives_out_values_gives_the_same_figures(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of vLLM's values, here with values that Transformers read: the same verdicts."""
    whole = project.report("--data", "data", *QUICK)

    def of_values(lm: Any, watchlist: Any) -> judging.Engine:
        reader = TransformersEngine(lm, watchlist)
        return judging.reading_engine(reader, watchlist, lm.tokenizer)

    monkeypatch.setattr(judging, "transformers_engine", of_values)
    again = project.report("--data", "data", *QUICK)
    assert rows(again, "letters") == rows(whole, "letters")
