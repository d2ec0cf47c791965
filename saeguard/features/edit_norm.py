"""How large a clamp's edit is beside the residual that it edits: data, no torch.

An edit as long as the residual replaces it, and the text falls apart. `measure_edit` measures both
norms in calibration, and the evidence keeps them, so that a clamp is judged without its checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol


class Clamped(Protocol):
    """A feature, loaded or as written in its file."""

    @property
    def low(self) -> float:
        """Value at share 0."""

    @property
    def high(self) -> float:
        """Value at share 1."""

    @property
    def evidence(self) -> Mapping[str, Any]:
        """What calibration measured."""


class Edit(NamedTuple):
    """The norms of an edit and of what it edits."""

    norm: float
    residual: float

    @property
    def in_words(self) -> str:
        """Return both norms, and one in terms of the other."""
        return (
            f"the edit's norm is up to {self.norm:.3g}, {self.norm / self.residual:.2g} times the "
            f"residual's typical norm of {self.residual:.3g}"
        )


def edit_of(how: str, amount: float, features: Iterable[Clamped]) -> Edit | None:
    """Return the largest edit that a clamp makes, None if a feature's norms were not measured.

    The latents are taken to be silent if they are set, and as strong as in the positive texts if
    they are scaled, cut down or switched off. Edits of several features add up.

    Args:
        how: `to`, `activation`, `scale`, `ablate` or `at_most`.
        amount: of the edit, see `saeguard.policy.types.Clamp`.
        features: that are clamped.
    """
    norm, residual = 0.0, 0.0
    for feature in features:
        measured = feature.evidence.get("edit")
        kept = measured if isinstance(measured, Mapping) else {}
        per, here = kept.get("per_activation"), kept.get("residual")
        if not isinstance(per, int | float) or not isinstance(here, int | float) or here <= 0:
            return None
        target = feature.low + amount * (feature.high - feature.low)
        change = {
            "to": target,
            "activation": amount,
            "scale": (amount - 1) * feature.high,
            "ablate": feature.high,
            "at_most": min(target - feature.high, 0.0),
        }[how]
        norm += abs(change) * per
        residual = max(residual, here)
    return Edit(norm, residual) if residual else None
