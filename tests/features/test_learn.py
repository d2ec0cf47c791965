"""One command from labelled texts and ordinary traffic to features, policies and a report."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from saeguard.cli.features import verb
from saeguard.cli.policy import verb as policy_verb
from saeguard.features.corpus import Corpus
from saeguard.features.cut import cut_by_template
from saeguard.features.learn import Subject, Wish, check_texts
from saeguard.features.learn import learn as learn_one
from saeguard.features.load import load_feature_set
from saeguard.features.search import SearchError
from saeguard.features.types import FeatureSet, ModelRef
from saeguard.hf import residual_cache
from saeguard.hf.model import load_model
from saeguard.hf.residual_cache import record_cached
from saeguard.hf.residuals import record
from saeguard.policy.load import load_policies
from tests.features.planted import corpus
from tests.guarded import feature_set
from tests.tiny import D, save_model

TEXTS = 240


def write(file: Path, *, told: bool = True, positives: bool = True, texts: int = TEXTS) -> None:
    """Write texts of which half hold a `#`; if `told`, those are the positives."""
    rng = random.Random(file.name)  # noqa: S311 - seeded texts, not secrets
    rows = []
    for i in range(texts):
        words = "".join(rng.choices("abcdefgh ", k=20))
        marked = positives and i % 2 == 0
        label = (i % 2 == 0 if told else i // 2 % 2 == 0) and positives
        row = {
            "id": f"{file.stem}-{i}",
            "prompt": "Say: ",
            "completion": f"{words[:8]}#{words[9:]}" if marked else words,
            "label": int(label),
            "kind": "hash" if label else "",
            "template": f"{file.stem}-{i // 4}",
        }
        rows.append(row)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which the command was run, on one behaviour that shows and one not."""
    folder = tmp_path_factory.mktemp("learnt")
    save_model(folder / "model")
    feature_set(folder / "sets", D)
    write(folder / "data" / "noise" / "marks.jsonl")
    write(folder / "data" / "noise" / "nothing.jsonl", told=False)
    write(folder / "data" / "noise" / "few.jsonl", texts=12)
    write(folder / "data" / "benign" / "chat.jsonl", positives=False, texts=600)
    result = learn(folder, "--holdout", str(folder / "held"), "--html", str(folder / "p.html"))
    assert result[0] == 0, result[1]
    (folder / "output.txt").write_text(result[1])
    return folder


def learn(folder: Path, *more: str) -> tuple[int, str]:
    """Run the command; return its exit code and what it printed."""
    command = [
        "learn", str(folder / "data"), "--model", str(folder / "model"), "--sae",
        str(folder / "sets" / "sae"), "--benign", str(folder / "data" / "benign"),
        "--set", str(folder / "feature_sets" / "own.yaml"), "--policies",
        str(folder / "policies"), "--out", str(folder / "report.json"), "--cache",
        str(folder / "cache"), "--owner", "team@example.com", "--fpr", "0.05", *more,
    ]  # fmt: skip
    done = CliRunner(env={"COLUMNS": "200"}).invoke(verb, command)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


def test_what_shows_becomes_a_feature(learnt: Path) -> None:
    """It is calibrated on texts of its own, and measured on held-out templates."""
    features = load_feature_set(learnt / "feature_sets" / "own.yaml")

    assert list(features.features) == ["marks"]
    evidence = features.features["marks"].evidence
    assert features.features["marks"].behaviour == "noise"
    assert evidence["holdout"]["interval"][0] > 0.9
    assert evidence["tpr_holdout"]["rate"] > 0.8
    assert evidence["fpr_holdout"]["texts"] == 200


def test_what_does_not_is_said(learnt: Path) -> None:
    """The report and the terminal say for each why it was not learnt."""
    report = json.loads((learnt / "report.json").read_text())
    rows = {row["feature"]: row for row in report["learnt"]}

    assert [row["learnt"] for row in rows.values()] == [False, True, False]
    assert "the search split has" in rows["few"]["reason"]
    assert rows["nothing"]["reason"].startswith("no better than ")
    assert rows["marks"]["texts"] == {
        "search": [60, 60], "calibration": [24, 24], "holdout": [36, 36],
    }  # fmt: skip
    assert "nothing: no better than " in (learnt / "output.txt").read_text()


def test_the_policy_is_sound(learnt: Path) -> None:
    """It is in shadow, takes the calibrated threshold, and its tests pass, recorded ones too."""
    [policy] = load_policies(learnt / "policies")
    threshold = load_feature_set(learnt / "feature_sets" / "own.yaml").features["marks"].threshold

    assert (policy.id, policy.mode, policy.feature_set) == ("noise.marks", "shadow", "own")
    assert 0 <= policy.detect["marks"].above - threshold < 0.001
    arguments = [str(learnt / "policies"), "--feature-sets", str(learnt / "feature_sets")]
    for name in ("test", "check"):
        done = CliRunner().invoke(policy_verb, [name, *arguments])
        assert done.exit_code == 0, done.output
    tests = (learnt / "policies" / "noise" / "marks.test.yaml").read_text()
    assert tests.count('recorded_text: "marks-') == 2


def test_the_held_out_texts_are_judged(learnt: Path) -> None:
    """The page of `evaluate` is about texts that no step of learning has seen."""
    lines = (learnt / "held" / "labelled" / "noise" / "marks.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    report = json.loads((learnt / "report.json").read_text())
    [counts] = [row["texts"] for row in report["learnt"] if row["feature"] == "marks"]

    assert [sum(row["label"] == x for row in rows) for x in (1, 0)] == counts["holdout"]
    assert {row["behaviour"] for row in rows} == {"noise"}
    ordinary = (learnt / "held" / "ordinary" / "chat.jsonl").read_text().splitlines()
    assert len(ordinary) == report["ordinary_texts"][2]
    assert "noise.marks" in (learnt / "p.html").read_text()


def test_again_it_computes_nothing_and_keeps_policies(
    learnt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was cut off goes on: residuals come from the cache."""

    def fail(*_: object) -> None:
        raise AssertionError("recorded again")

    before = (learnt / "policies" / "noise" / "marks.yaml").read_bytes()
    monkeypatch.setattr(residual_cache, "record", fail)
    code, output = learn(learnt)

    assert code == 0, output
    assert "is kept as it is" in output
    assert (learnt / "policies" / "noise" / "marks.yaml").read_bytes() == before


def test_nothing_learnt_is_a_finding(learnt: Path) -> None:
    """Exit code 1, and no set."""
    (learnt / "data" / "noise" / "marks.jsonl").unlink()
    (learnt / "feature_sets" / "own.yaml").unlink()
    code, output = learn(learnt)

    assert code == 1, output
    assert "Nothing was learnt" in output
    assert not (learnt / "feature_sets" / "own.yaml").exists()


ENOUGH_OF_EACH = [(30, 30), (9, 9), (20, 20)]


@pytest.mark.parametrize(
    ("labelled", "ordinary", "says"),
    [
        ({"a": ENOUGH_OF_EACH, "b": [(1, 1)] * 3}, (1, 1, 1), None),
        ({"a": [(30, 30), (9, 9), (20, 19)]}, (1, 1, 1), "about 67 of each label in a file; a has"),
        ({"a": [(30, 19), (9, 9), (20, 20)]}, (1, 1, 1), "a has 30 positive and 19 negative"),
        ({"a": ENOUGH_OF_EACH}, (0, 0, 0), "tokens in scope output, got none for the search and"),
        ({"a": ENOUGH_OF_EACH}, (9, 0, 9), r"none for the calibration part \(18 in all\)"),
    ],
)
def test_texts_are_counted_before_the_model_reads_them(
    labelled: dict[str, list[tuple[int, int]]], ordinary: tuple[int, int, int], says: str | None
) -> None:
    """Too few of each label, or no ordinary one with a token in scope."""
    if says is None:
        check_texts(labelled, ordinary, "output")
    else:
        with pytest.raises(SearchError, match=says):
            check_texts(labelled, ordinary, "output")


def test_the_cut() -> None:
    """No template in two parts; each cell by its fractions; the same for the same seed."""
    rng = np.random.default_rng(0)
    texts = [(f"{file}/{label}", f"{file}{t}") for file in "ab" for t in range(60)
             for label in rng.integers(0, 2, rng.integers(1, 6))]  # fmt: skip
    part = cut_by_template(texts, 3)

    assert part == cut_by_template(texts[::-1], 3)
    assert part != cut_by_template(texts, 4)
    for cell in {cell for cell, _ in texts}:
        of = np.array([part[template] for c, template in texts if c == cell])
        shares = np.bincount(of, minlength=3) / len(of)
        assert shares == pytest.approx([0.5, 0.2, 0.3], abs=0.06)


def test_the_cache_gives_back_what_was_recorded(tmp_path: Path) -> None:
    """To the bit; a damaged file is written again; another layer has files of its own."""
    lm = load_model(save_model(tmp_path / "model"))
    texts = [[3, 4, 5], [6], [7, 8, 9, 10]]
    cache = tmp_path / "cache"

    first = dict(record_cached(lm, texts, [1], cache))
    alone = dict(record(lm, texts, [1]))
    assert sorted(first) == [0, 1, 2]
    for i, found in first.items():
        torch.testing.assert_close(found[1], alone[i][1], rtol=0, atol=0)
    [file] = cache.iterdir()
    file.write_bytes(file.read_bytes()[:-8])
    again = dict(record_cached(lm, texts, [1], cache))
    assert all(torch.equal(again[i][1], found[1]) for i, found in first.items())
    dict(record_cached(lm, texts, [0], cache))
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("only", [True, False])
def test_labelled_only(monkeypatch: pytest.MonkeyPatch, *, only: bool) -> None:
    """Ordinary texts are among those that a detector is chosen on, unless that is not wanted."""
    chosen_on: list[int] = []

    def searched(_info: object, split: Corpus, *_: object, **__: object) -> None:
        chosen_on.append(len(split))
        raise SearchError("enough seen")

    monkeypatch.setattr("saeguard.features.learn.search", searched)
    texts, ordinary = corpus("search", 60), corpus("benign", 90)
    subject = Subject("f", "t", "b", "", texts, np.arange(60), np.arange(60) % 3)
    empty = FeatureSet("s", Path("s.yaml"), ModelRef("m", 128, 2), None, {}, (), "")
    learn_one(empty, None, subject, (ordinary, ordinary, ordinary), Wish(labelled_only=only))
    labelled = int((subject.part == 0).sum())
    negatives = int((~texts.label & (subject.part == 0)).sum())
    assert chosen_on == [labelled + (0 if only else negatives)]
