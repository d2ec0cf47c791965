"""Pipeline parallelism: what a stage's taps read travels to the last stage with the hidden states.

vLLM sends one dictionary of tensors from stage to stage in each pass with rows, in the order of
passes. The readings are further entries of it, so there is no message of the guard's own that
could cross with another, be waited for in vain, or belong to another of the passes in flight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

PREFIX = "saeguard."
ACTED = "acted."


class Reading(NamedTuple):
    """What one layer's tap read in a pass, on the device."""

    f: torch.Tensor
    """[rows, watched] float32."""
    ticks: torch.Tensor
    """[1] int64: how often the tap ran."""
    acted: Mapping[str, torch.Tensor]
    """[rows, rules] bool, by digest of the clamps; empty where nothing can clamp."""

    def copy(self) -> Reading:
        """Return what the next run of the tap will not change.

        vLLM waits for a send before the next pass over requests, but not before a dummy pass.
        """
        acted = {digest: where.clone() for digest, where in self.acted.items()}
        return Reading(self.f.clone(), self.ticks.clone(), acted)


def take(intermediate: Any) -> dict[int, Reading]:
    """Take the earlier stages' readings, by layer, out of what they sent; None sends nothing."""
    if intermediate is None:
        return {}
    tensors = intermediate.tensors
    ours = {key: tensors.pop(key) for key in [k for k in tensors if k.startswith(PREFIX)]}
    found: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in ours.items():
        layer, name = key.removeprefix(PREFIX).split(".", 1)
        found.setdefault(int(layer), {})[name] = value
    return {
        layer: Reading(
            parts.pop("f"),
            parts.pop("ticks"),
            {name.removeprefix(ACTED): where for name, where in parts.items()},
        )
        for layer, parts in found.items()
    }


def put(intermediate: Any, readings: dict[int, Reading]) -> Any:
    """Return intermediate tensors with readings among them."""
    entries: dict[str, torch.Tensor] = {}
    for layer, reading in readings.items():
        entries[f"{PREFIX}{layer}.f"] = reading.f
        entries[f"{PREFIX}{layer}.ticks"] = reading.ticks
        for digest, where in reading.acted.items():
            entries[f"{PREFIX}{layer}.{ACTED}{digest}"] = where
    return type(intermediate)({**intermediate.tensors, **entries})
