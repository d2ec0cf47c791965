"""Baselines are scored on templates that they were not fitted on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline

from saeguard.evaluation import baselines
from saeguard.evaluation.figures import Detector, area
from tests.evaluation.project import lines
from tests.evaluation.test_datasets import read, write


def test_words_equal_a_plain_reference(tmp_path: Path) -> None:
    """The mean over five folds of TF-IDF and logistic regression, cut by template."""
    rows = list(lines(80))
    dataset = read(write(tmp_path / "set.jsonl", *rows))
    found = baselines.words(dataset, "output", ["abc", "", "xyz"])
    assert isinstance(found, Detector)
    texts = np.array([row["completion"] for row in rows])
    areas = []
    for train, held in GroupKFold(5).split(texts, groups=dataset.template):
        model = make_pipeline(
            TfidfVectorizer(token_pattern=baselines.WORD), LogisticRegression(C=10, max_iter=2000)
        ).fit(texts[train], dataset.label[train])
        areas.append(roc_auc_score(dataset.label[held], model.decision_function(texts[held])))
    measured = area(found.score, dataset.label, dataset.template, found.fold, 0)
    assert measured is not None
    assert measured["value"] == pytest.approx(np.mean(areas))
    assert [len(scores) for scores in found.benign] == [2] * 5


def test_probe_finds_a_direction_and_no_noise(tmp_path: Path) -> None:
    """One shifted coordinate is found; templates that are copies do not leak into the fit."""
    rng = np.random.default_rng(0)
    rows = [{**line, "template": f"t{i // 4}"} for i, line in enumerate(lines(200))]
    dataset = read(write(tmp_path / "set.jsonl", *rows))
    x = rng.standard_normal((200, 12)).astype(np.float32)
    x[:, 3] += 3 * dataset.label
    found = baselines.probe(dataset, "output", 4, 1, x, x[:10])
    assert isinstance(found, Detector)
    assert found.name == "probe, last token, layer 4"
    measured = area(found.score, dataset.label, dataset.template, found.fold, 0)
    assert measured is not None
    assert measured["value"] > 0.95
    # A template's own position: known from its copies in a fit by row, useless in one by template.
    place = rng.standard_normal((50, 12)).astype(np.float32)[np.arange(200) // 4]
    label = rng.permutation(50)[np.arange(200) // 4] < 25
    copies = read(
        write(
            tmp_path / "copies.jsonl",
            *({**row, "label": int(y)} for row, y in zip(rows, label, strict=True)),
        )
    )
    noise = baselines.probe(copies, "output", 4, 0, place, x[:0])
    assert isinstance(noise, Detector)
    chance = area(noise.score, copies.label, copies.template, noise.fold, 0)
    assert chance is not None
    assert chance["value"] < 0.7


def test_texts_without_tokens_are_not_scored(tmp_path: Path) -> None:
    """Their residual is missing; the others are scored."""
    dataset = read(write(tmp_path / "set.jsonl", *lines(60)))
    x = np.random.default_rng(1).standard_normal((60, 4)).astype(np.float32)
    x[7] = np.nan
    found = baselines.probe(dataset, "output", 0, 0, x, x[:0])
    assert isinstance(found, Detector)
    assert np.flatnonzero(np.isnan(found.score)).tolist() == [7]


def test_why_there_is_no_baseline(tmp_path: Path) -> None:
    """Nothing to read, or one template."""
    dataset = read(write(tmp_path / "set.jsonl", *({**r, "template": "t"} for r in lines(20))))
    assert "too few templates" in str(baselines.words(dataset, "output", []))
    whole = read(write(tmp_path / "texts.jsonl", {"id": "a", "text": "x"}))
    assert baselines.words(whole, "prompt", []) == "no text has a part to read: prompt"


def test_length_counts_characters(tmp_path: Path) -> None:
    """Of the part that is read; texts and ordinary texts without it are left out."""
    rows = [{"id": "a", "text": "four"}, {"id": "b", "prompt": "x", "completion": ""}]
    dataset = read(write(tmp_path / "set.jsonl", *rows))
    found = baselines.length(dataset, "output", np.array([0, 9]))
    np.testing.assert_array_equal(found.score, [4, np.nan])
    assert found.benign[0].tolist() == [9]


def test_spread() -> None:
    """Evenly, never more than asked for."""
    assert baselines.spread(3, 10).all()
    assert np.flatnonzero(baselines.spread(101, 3)).tolist() == [0, 50, 100]
