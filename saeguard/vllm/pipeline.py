"""Pipeline parallelism: what a stage's taps read travels to the last stage with the hidden states.

vLLM sends one dictionary of tensors from stage to stage in each pass with rows, in the order of
passes. The readings are further entries of it, so there is no message of the guard's own that
could cross with another, be waited for in vain, or belong to another of the passes in flight.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

PREFIX = "saeguard."


class Reading(NamedTuple):
    """What one layer's tap read in a pass, on the device."""

    f: torch.Tensor
    """[rows, watched] float32."""
    ticks: torch.Tensor
    """[1] int64: how often the tap ran."""
    acted: torch.Tensor | None
    """[rows, rules] bool, None where nothing can clamp."""

    def copy(self) -> Reading:
        """Return what the next run of the tap will not change.

        vLLM waits for a send before the next pass over requests, but not before a dummy pass.
        """
        acted = None if self.acted is None else self.acted.clone()
        return Reading(self.f.clone(), self.ticks.clone(), acted)


def take(intermediate: Any) -> dict[int, Reading]:
    """Take the earlier stages' readings, by layer, out of what they sent; None sends nothing."""
    if intermediate is None:
        return {}
    tensors = intermediate.tensors
    ours = {key: tensors.pop(key) for key in [k for k in tensors if k.startswith(PREFIX)]}
    return {
        int(key.removeprefix(PREFIX).removesuffix(".f")): Reading(
            f, ours[f"{key[:-2]}.ticks"], ours.get(f"{key[:-2]}.acted")
        )
        for key, f in ours.items()
        if key.endswith(".f")
    }


def put(intermediate: Any, readings: dict[int, Reading]) -> Any:
    """Return intermediate tensors with readings among them."""
    entries = {
        f"{PREFIX}{layer}.{name}": value
        for layer, reading in readings.items()
        for name, value in reading._asdict().items()
        if value is not None
    }
    return type(intermediate)({**intermediate.tensors, **entries})
