"""Whether a feature's evidence says that it is of no use; reads the set, needs no texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

FEW = 0.02
"""A threshold that no more than this fraction of the positives exceeds catches nothing."""
CHANCE = 0.5
PERCENT = 5.0
"""A share from here on is taken for a percentage."""
ROUNDING = 1e-3
"""Thresholds are written with three decimals, rounded up."""


class Measured(Protocol):
    """A feature, loaded or as written in its file."""

    @property
    def evidence(self) -> Mapping[str, Any]:
        """What search and calibration measured."""

    @property
    def threshold(self) -> float:
        """Its calibrated threshold."""


def no_better_than_chance(evidence: Mapping[str, Any]) -> str:
    """Return why a detector separates nothing, empty if it does or if that was not measured.

    Args:
        evidence: `holdout` has AUROC and interval.
    """
    area, interval = _number(evidence, "holdout", "auroc"), _part(evidence, "holdout", "interval")
    if area is None or not _is_interval(interval) or interval[0] > CHANCE:
        return ""
    low, high = interval
    return (
        f"no better than chance: its AUROC on the hold-out is {area:.3f} (95 %: {low:.3f} to "
        f"{high:.3f})"
    )


def no_better_than_random(evidence: Mapping[str, Any]) -> str:
    """Return that random latents do as well, empty if they do not or if that was not measured.

    Then the texts differ so much that anything tells them apart, and the feature need not read the
    behaviour.

    Args:
        evidence: `compared.random_group` has the AUROC of the best group of random latents.
    """
    area = _number(evidence, "holdout", "auroc")
    control = _number(evidence, "compared", "random_group", "auroc")
    if area is None or control is None or area > control:
        return ""
    return (
        f"no better than random latents: its AUROC on the hold-out is {area:.3f}, that of a group "
        f"of random latents {control:.3f}"
    )


def weaknesses(feature: Measured, above: float, window: str) -> Iterator[str]:
    """Yield each reason for which a selection `feature > above` would be of no use.

    Args:
        feature: of the selection.
        above: the share that must be exceeded.
        window: the policy's, as the evidence spells it: `3 of 8`.
    """
    evidence = feature.evidence
    chance = no_better_than_chance(evidence)
    if chance:
        yield chance
    reach, caught = _number(evidence, "reach"), _number(evidence, "tpr_holdout", "rate")
    # Calibrated without labels, the range ends where the strongest ordinary text does.
    by_ordinary = "fpr_calibration" in evidence and reach is None and caught is None
    if above > 1 and not by_ordinary:
        yield f"{above:g} lies above the calibrated range, which ends at 1{_percent(above)}"
    if reach is not None and above >= reach:
        yield (
            f"at most {FEW:.0%} of the positives have a token above {above:g}; the strongest "
            f"{FEW:.0%} begin at {reach:g}"
        )
        return
    same = evidence.get("window") in ("1 of 1", window)
    if caught is not None and caught <= FEW and same and above >= feature.threshold:
        yield f"at the calibrated threshold it catches {caught:.1%} of the hold-out's positives"


def unseen(feature: Measured, above: float) -> str:
    """Return that calibration saw no token above a threshold, empty if it did or is not known.

    Args:
        feature: calibrated; its evidence has `highest`, unless an earlier version wrote it.
        above: the share that must be exceeded.
    """
    highest = _number(feature.evidence, "highest")
    if highest is None and "fpr_calibration" in feature.evidence:
        # The range ends at the strongest of the ordinary texts, or the threshold beyond it.
        highest = max(1.0, feature.threshold)
    if highest is None or above <= highest + ROUNDING:
        return ""
    return (
        f"no token of the texts that it was calibrated on is above {above:g}; the strongest is at "
        f"{highest:g}{_percent(above)}"
    )


def _percent(above: float) -> str:
    """Return the advice for a share that was meant as a percentage, if it looks like one."""
    return f"; for {above:g} % write {above / 100:g}" if above >= PERCENT else ""


def useless_with_topic(evidence: Mapping[str, Any]) -> str:
    """Return that behaviour and topic together catch nothing, empty if they do or have no measure.

    Args:
        evidence: of the behaviour; `with_topic.tpr_holdout` has the rate of texts that match both.
    """
    caught = _number(evidence, "with_topic", "tpr_holdout", "rate")
    if caught is None or caught > FEW:
        return ""
    return f"with its topic it catches {caught:.1%} of the hold-out's positives"


def unmeasured(evidence: Mapping[str, Any]) -> bool:
    """Return whether nothing tells how much of a behaviour a feature catches."""
    return _number(evidence, "tpr_holdout", "rate") is None and (
        _number(evidence, "holdout", "auroc") is None
    )


def _part(evidence: Mapping[str, Any], *keys: str) -> Any:
    """Return a nested value, None if a level is missing: people may edit evidence."""
    found: Any = evidence
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _number(evidence: Mapping[str, Any], *keys: str) -> float | None:
    found = _part(evidence, *keys)
    return float(found) if isinstance(found, int | float) else None


def _is_interval(found: Any) -> bool:
    ends = found if isinstance(found, list | tuple) else ()
    return len(ends) == len(("low", "high")) and all(isinstance(x, int | float) for x in ends)
