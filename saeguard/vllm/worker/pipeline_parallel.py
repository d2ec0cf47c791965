"""Pipeline parallelism: what a stage's taps read travels to the last stage with the hidden states.

vLLM sends one dictionary of tensors from stage to stage in each forward pass with rows, in order.
The readings are further entries of that dictionary. So the guard sends no message of its own,
which could arrive late, never, or with another of the passes in flight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from saeguard.vllm.patches import assumes, calls, reads

PREFIX = "saeguard."
"""Prefix of the guard's keys; the layer and the name of the entry follow."""
ACTED = "acted."
"""Prefix of the name of an entry that holds which rows were edited; a clamps digest follows."""

reads(
    "vllm.sequence:IntermediateTensors",
    "tensors",
    why="readings of earlier stages travel in it under keys `saeguard.*`, and are taken out before "
    "the runner looks",
)
calls(
    "vllm.sequence:IntermediateTensors",
    "tensors",
    why="readings are sent on in a new object with further entries",
)
assumes(
    "a worker sends `IntermediateTensors.tensors` whole, once a forward pass with rows, and the "
    "next runner reads the keys that it knows",
    why="readings of earlier stages travel in it",
)


class Reading(NamedTuple):
    """What one layer's tap read in a forward pass, on the device; on a CPU also as arrays."""

    f: Any
    """[rows, columns] float32 activations."""
    ticks: Any
    """[1] int64: how often the tap ran."""
    acted: Mapping[str, Any]
    """[rows, clamp policies] bool, whether a row was edited, by digest of the clamps."""

    def copy(self) -> Reading:
        """Return a copy that the next run of the tap does not change.

        vLLM waits for a send before the next pass over requests, but not before a dummy pass.
        """
        acted = {digest: where.clone() for digest, where in self.acted.items()}
        return Reading(self.f.clone(), self.ticks.clone(), acted)


def take(intermediate: Any) -> dict[int, Reading]:
    """Remove the earlier stages' readings from the tensors that they sent; return them by layer.

    Args:
        intermediate: an `IntermediateTensors`, or None on the first stage.
    """
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
    """Return a copy of intermediate tensors to which readings by layer are added."""
    entries: dict[str, torch.Tensor] = {}
    for layer, reading in readings.items():
        entries[f"{PREFIX}{layer}.f"] = reading.f
        entries[f"{PREFIX}{layer}.ticks"] = reading.ticks
        for digest, where in reading.acted.items():
            entries[f"{PREFIX}{layer}.{ACTED}{digest}"] = where
    return type(intermediate)({**intermediate.tensors, **entries})
