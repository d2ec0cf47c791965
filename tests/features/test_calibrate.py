"""Thresholds hold the wished rate, on the texts that set them and on others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saeguard.features.calibrate import MIN_SHARE, Texts, calibrate, shares, threshold_for, values
from saeguard.features.corpus import peaks
from saeguard.features.probe import Probe, save_probes
from saeguard.features.reading import Reading
from saeguard.features.types import Feature, FeatureSet, ModelRef, SaeRef, Term
from saeguard.sae import inspect
from tests.features.planted import PLANTED, D, N, corpus, save_sae


def feature_set(folder: Path, feature: Feature) -> FeatureSet:
    """Return a set of one feature on the planted SAE."""
    info = inspect(save_sae(folder / "sae"))
    return FeatureSet(
        id="demo",
        path=folder / "demo.yaml",
        model=ModelRef("m", D, 3),
        sae=SaeRef(info.path, info.sha256, info.layer, D, N),
        features={feature.id: feature},
        exclude_tokens=(0,),
        digest="",
        title="Demo",
    )


def feature(**changes: Any) -> Feature:
    """Return a group of the planted latents, not yet calibrated."""
    base = Feature(
        id="planted",
        title="Planted",
        behaviour="b",
        detect=tuple(Term(latent, 1.0) for latent in PLANTED),
        probe=None,
        clamp=(),
        low=0.0,
        high=1.0,
        threshold=0.5,
        evidence={"kind": "k"},
    )
    return replace(base, **changes)


TEXTS = Texts(
    benign=corpus("calm", 1200).of_kind("none"),
    check=corpus("quiet", 1200).of_kind("none"),
    split=corpus("search"),
    holdout=corpus("holdout"),
)


@pytest.mark.parametrize("fpr", [0.0, 0.01, 0.1])
def test_holds_the_wished_rate(tmp_path: Path, fpr: float) -> None:
    """No more ordinary texts exceed the threshold than wished, and the planted ones do."""
    done = calibrate(feature_set(tmp_path, feature()), feature(), TEXTS, fpr=fpr)
    assert done.evidence["fpr_calibration"]["rate"] <= fpr
    assert done.evidence["fpr_holdout"]["interval"][0] <= fpr + 0.01
    assert done.evidence["tpr_holdout"]["rate"] > 0.9
    assert done.low == 0.0
    top = peaks(TEXTS.split, values(feature_set(tmp_path, done), done, TEXTS.split))
    assert done.high == pytest.approx(np.quantile(top[TEXTS.split.label], 0.99), rel=1e-4)


def test_probe_has_a_range(tmp_path: Path) -> None:
    """A probe's range starts at the ordinary median, so that its threshold is a positive share."""
    w = (inspect(save_sae(tmp_path / "sae")), np.ones(D, np.float32))[1]
    refs = save_probes({"p": Probe((1,), w[None], -3.0)}, tmp_path / "p.safetensors")
    probe = feature(detect=(), probe=refs["p"])
    done = calibrate(feature_set(tmp_path, probe), probe, TEXTS, fpr=0.05)
    quiet = peaks(TEXTS.benign, values(feature_set(tmp_path, done), done, TEXTS.benign))
    assert np.median(shares(done, quiet)) == pytest.approx(0, abs=1e-3)
    assert done.threshold > 0
    assert done.evidence["fpr_calibration"]["rate"] <= 0.05


def test_window_lowers_the_threshold(tmp_path: Path) -> None:
    """Where two of three tokens must hold, ordinary texts reach less."""
    features = feature_set(tmp_path, feature())
    one = calibrate(features, feature(), TEXTS, fpr=0.2)
    two = calibrate(features, feature(), TEXTS, fpr=0.2, reading=Reading(2, 3))
    assert two.threshold <= one.threshold
    assert two.evidence["window"] == "2 of 3"


def test_without_labels_the_range_stays(tmp_path: Path) -> None:
    """Ordinary texts alone set the threshold only."""
    known = feature(high=9.0)
    done = calibrate(feature_set(tmp_path, known), known, Texts(TEXTS.benign), fpr=0.01)
    assert (done.low, done.high) == (0.0, 9.0)
    assert "tpr_holdout" not in done.evidence


def test_threshold_is_exact() -> None:
    """Exactly the allowed number of texts exceed it; silence still needs a rise."""
    share = np.arange(1, 101) / 100
    for fpr in (0.0, 0.01, 0.05):
        assert (share > threshold_for(share, fpr)).sum() == round(100 * fpr)
    assert threshold_for(np.zeros(50), 0.01) == MIN_SHARE


def test_snippets_mark_the_strongest_token(tmp_path: Path) -> None:
    """Snippets are of different templates and mark an output token."""
    done = calibrate(
        feature_set(tmp_path, feature()),
        feature(),
        TEXTS,
        fpr=0.01,
        decode=lambda ids: "".join(map(str, ids)),
    )
    snippets = done.evidence["snippets"]
    assert len(snippets) == 5
    assert all(s["label"] == 1 and s["text"].replace(">>", "").replace("<<", "") == "0123456789"
               for s in snippets)  # fmt: skip
    assert all(s["text"].index(">>") >= 4 for s in snippets)
