"""What the evidence says against a feature is found, whatever else the evidence holds."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saeguard.features.calibrate import Texts, calibrate
from saeguard.features.edit_norm import edit_of
from saeguard.features.load import load_feature_set, save_feature_set
from saeguard.features.types import Term
from saeguard.features.weakness import unmeasured, unseen, weaknesses
from saeguard.sae import read_decoder_rows
from tests.features.planted import PLANTED
from tests.features.test_calibrate import TEXTS, feature, feature_set

SHUFFLED = Texts(
    TEXTS.benign,
    TEXTS.check,
    TEXTS.split,
    replace(TEXTS.holdout, label=np.random.default_rng(3).permutation(TEXTS.holdout.label)),
)
"""Labels of the hold-out that have nothing to do with its texts."""


def reasons(evidence: dict[str, Any], above: float = 0.5, window: str = "1 of 1") -> list[str]:
    """Return what this evidence says against a selection; the calibrated threshold is 0.5."""
    return list(weaknesses(feature(evidence=evidence), above, window))


def test_a_good_feature_is_not_doubted(tmp_path: Path) -> None:
    """A planted latent catches its positives, also at the strongest of them."""
    done = calibrate(feature_set(tmp_path, feature()), feature(), TEXTS, fpr=0.01)

    assert not unmeasured(done.evidence)
    assert done.threshold < done.evidence["reach"]
    assert list(weaknesses(done, done.threshold, "1 of 1")) == []


def test_a_threshold_that_the_positives_do_not_reach(tmp_path: Path) -> None:
    """`reach` is where the last 2 % of the positives begin."""
    done = calibrate(feature_set(tmp_path, feature()), feature(), TEXTS, fpr=0.01)
    reach = done.evidence["reach"]

    assert list(weaknesses(done, reach - 0.01, "1 of 1")) == []
    [reason] = weaknesses(done, reach, "1 of 1")
    assert f"have a token above {reach:g}" in reason


def test_chance_is_seen_in_the_calibration_alone(tmp_path: Path) -> None:
    """A set that no search wrote gets its AUROC from the labelled texts."""
    done = calibrate(feature_set(tmp_path, feature()), feature(), SHUFFLED, fpr=0.01)

    [reason] = weaknesses(done, done.threshold, "1 of 1")
    assert reason.startswith("no better than chance: its AUROC on the hold-out is ")


def test_another_window_is_not_judged_by_the_calibrated_one() -> None:
    """One token of eight may catch more than three of eight, never less than one of one."""
    evidence = {"tpr_holdout": {"rate": 0.0}, "window": "3 of 8"}

    assert len(reasons(evidence, window="3 of 8")) == 1
    assert reasons(evidence, window="1 of 1") == []
    assert reasons(evidence, above=0.4, window="3 of 8") == []
    assert len(reasons(evidence | {"window": "1 of 1"}, window="3 of 8")) == 1


@pytest.mark.parametrize(
    "evidence",
    [
        {},
        {"holdout": "good"},
        {"holdout": {"auroc": "0.5", "interval": [0.4, 0.6]}},
        {"holdout": {"auroc": None, "interval": 0.4}},
        {"tpr_holdout": None, "reach": "far"},
    ],
)
def test_evidence_that_people_wrote(evidence: dict[str, Any]) -> None:
    """What is not a number is not measured."""
    assert reasons(evidence) == []
    assert unmeasured(evidence)


def test_a_threshold_above_the_range() -> None:
    """A share of 1 is as strong as in the positive texts."""
    assert reasons({}, above=1.0) == []
    assert reasons({}, above=1.01) == ["1.01 lies above the calibrated range, which ends at 1"]
    ordinary = {"fpr_calibration": {"rate": 0.0, "interval": [0.0, 0.1], "hits": 0, "texts": 9}}
    assert reasons(ordinary, above=1.01) == [], "ordinary texts alone set this range"


def test_what_was_measured_for_another_threshold_is_dropped(tmp_path: Path) -> None:
    """Without labels a new threshold has no true-positive rate."""
    features = feature_set(tmp_path, feature())
    once = calibrate(features, feature(), TEXTS, fpr=0.01)
    again = calibrate(features, once, Texts(TEXTS.benign), fpr=0.2)

    assert "tpr_holdout" not in again.evidence
    assert "fpr_holdout" not in again.evidence
    assert again.evidence["reach"] == once.evidence["reach"]


def test_a_new_set_can_be_loaded_only_to_be_calibrated(tmp_path: Path) -> None:
    """A feature without range and threshold is saved without them; calibration finds both."""
    new = feature(low=math.nan, high=math.nan, threshold=math.nan)
    features = feature_set(tmp_path, new)
    save_feature_set(features, features.path)

    assert "threshold" not in features.path.read_text()
    with pytest.raises(ValueError, match="has no low, high, threshold yet; run `saeguard features"):
        load_feature_set(features.path)
    loaded = load_feature_set(features.path, unfinished=True)
    assert not loaded.calibrated
    done = calibrate(loaded, loaded.features["planted"], Texts(TEXTS.benign), fpr=0.01)
    assert 0 == done.low < done.high
    assert done.threshold <= 1
    save_feature_set(replace(loaded, features={"planted": done}), features.path)
    assert load_feature_set(features.path).calibrated


class TestEdit:
    """The norm of an edit beside the residual's."""

    def test_both_norms_are_kept(self, tmp_path: Path) -> None:
        """They are the norm of the weighted decoder rows, and the residuals' median norm."""
        clamped = feature(clamp=(Term(PLANTED[0], 1.0), Term(PLANTED[1], 0.5)))
        features = feature_set(tmp_path, clamped)
        done = calibrate(features, clamped, TEXTS, fpr=0.01)

        rows = read_decoder_rows(features.sae.inspect(), PLANTED)
        looked = torch.from_numpy(TEXTS.benign.looked)
        norm = float((rows[0] + 0.5 * rows[1]).norm())
        residual = float(np.median(TEXTS.benign.x[looked].norm(dim=1)))
        assert done.evidence["edit"]["per_activation"] == pytest.approx(norm, rel=1e-3)
        assert done.evidence["edit"]["residual"] == pytest.approx(residual, rel=1e-3)

    @pytest.mark.parametrize(
        ("how", "amount", "norm"),
        [("to", 0, 0), ("to", 5, 20), ("activation", -3, 6), ("scale", 0.5, 2), ("ablate", 0, 4),
         ("at_most", 0.5, 2), ("at_most", 2, 0)],
    )  # fmt: skip
    def test_each_edit(self, how: str, amount: float, norm: float) -> None:
        """With a range up to 2 and 2 per unit of activation."""
        clamped = feature(high=2.0, evidence={"edit": {"per_activation": 2.0, "residual": 10.0}})

        edit = edit_of(how, amount, [clamped])
        assert edit is not None
        assert (edit.norm, edit.residual) == (pytest.approx(norm), 10.0)
        twice = edit_of(how, amount, [clamped, clamped])
        assert twice is not None
        assert twice.norm == pytest.approx(2 * norm)

    def test_what_was_not_measured_is_not_guessed(self) -> None:
        """One feature of several without norms, and there is no sum."""
        measured = feature(evidence={"edit": {"per_activation": 2.0, "residual": 10.0}})

        assert edit_of("to", 1.0, [measured, feature()]) is None


def test_a_threshold_beyond_all_that_calibration_saw(tmp_path: Path) -> None:
    """Without labelled texts, too: a percentage in place of a share is noticed."""
    ordinary = Texts(TEXTS.benign, TEXTS.check)
    done = calibrate(feature_set(tmp_path, feature()), feature(), ordinary, fpr=0.01)
    highest = done.evidence["highest"]

    assert list(weaknesses(done, 60, "1 of 1")) == []  # which only labelled texts can tell
    assert unseen(done, done.threshold) == ""
    assert unseen(done, highest) == ""
    assert unseen(done, highest + 0.01).startswith("no token of the texts")
    assert unseen(done, 60).endswith("; for 60 % write 0.6")
    earlier = replace(done, evidence={k: v for k, v in done.evidence.items() if k != "highest"})
    bound = max(1, done.threshold)
    assert unseen(earlier, 60).endswith(f"the strongest is at {bound:g}; for 60 % write 0.6")
    assert unseen(earlier, bound) == ""
    assert unseen(replace(done, evidence={}), 60) == ""
