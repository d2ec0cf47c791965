"""Measure how far features move when a model runs under other arithmetic: type, quantisation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from saeguard.features.schema import FeatureSetFile
from saeguard.features.types import MeasuredDrift
from saeguard.policy_tools.recording import Recording, RecordingError

DIGITS = 4
"""Decimals of what a feature set records."""


class Drift(NamedTuple):
    """How far one feature moved between two recordings of the same texts."""

    feature: str
    """`set/feature`."""
    tokens: int
    """Tokens evaluated in both."""
    mean: float
    """Mean absolute difference of its share."""
    p99: float
    """99 % of the tokens differ by less."""
    highest: float
    fired: int
    """Tokens above the feature's threshold in the first recording."""
    lost: int
    """Of these, those not above it in the second."""
    gained: int
    """Tokens above it in the second recording only."""


def measure_drift(
    first: Recording, second: Recording, feature_sets: Mapping[str, FeatureSetFile]
) -> Iterator[Drift]:
    """Yield the drift of each feature of two recordings.

    Args:
        first: under the arithmetic of the calibration.
        second: of the same texts, under the arithmetic of serving.
        feature_sets: by name.

    Raises:
        RecordingError: the recordings are of other texts or features.
    """
    if first.ids != second.ids or not np.array_equal(first.lengths, second.lengths):
        raise RecordingError(
            f"{second.path}: expected the texts of {first.path}, found others; record the same "
            "file twice"
        )
    both = first.evaluable & second.evaluable
    for massive in (first.massive, second.massive):
        both = both if massive is None else both & ~massive
    for column, (name, digest) in enumerate(first.definitions.items()):
        if second.definitions.get(name) != digest:
            raise RecordingError(
                f"{second.path}: expected the feature {name} as {first.path} has it, found "
                f"{'another' if name in second.definitions else 'none'}; record both with one set"
            )
        set_, _, feature = name.rpartition("/")
        if set_ not in feature_sets or feature not in feature_sets[set_].features:
            raise RecordingError(f"{first.path}: the feature {name} is in no feature set here")
        part = feature_sets[set_].features[feature]
        other = list(second.definitions).index(name)
        values = np.stack([first.values[both, column], second.values[both, other]])
        shares = (values.astype(np.float64) - part.low) / (part.high - part.low)
        moved = np.abs(shares[1] - shares[0])
        before, after = shares > part.threshold
        yield Drift(
            name,
            int(both.sum()),
            float(moved.mean()) if len(moved) else 0.0,
            float(np.quantile(moved, 0.99)) if len(moved) else 0.0,
            float(moved.max(initial=0.0)),
            int(before.sum()),
            int((before & ~after).sum()),
            int((after & ~before).sum()),
        )


def of_set(found: Iterable[Drift], set_: str) -> MeasuredDrift:
    """Return the drift of a set: that of the feature that moved most, and the sums of crossings.

    Raises:
        RecordingError: the recordings hold no feature of the set.
    """
    mine = [drift for drift in found if drift.feature.rpartition("/")[0] == set_]
    if not mine:
        raise RecordingError(f"the recordings hold no feature of the set {set_}")
    return MeasuredDrift(
        max(drift.tokens for drift in mine),
        round(max(drift.p99 for drift in mine), DIGITS),
        round(max(drift.highest for drift in mine), DIGITS),
        sum(drift.fired for drift in mine),
        sum(drift.lost for drift in mine),
        sum(drift.gained for drift in mine),
    )
