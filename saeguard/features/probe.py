"""Linear probes on the residual: one more encoder row at each of their layers, without activation.

A probe of several layers is a sum. Each layer's part is computed where that layer is read, and
`features/value.py` adds the parts up. The bias belongs to the part of the first layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from saeguard.errors import InputError
from saeguard.features.pins import file_digest
from saeguard.features.types import ProbeRef, Term
from saeguard.features.value import term_values
from saeguard.real_path import real_path


class ProbeError(InputError):
    """A probe file is missing, damaged, or of another width."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A fitted probe in the units of the residual."""

    layers: tuple[int, ...]
    """`resid_post` of these blocks, in ascending order."""
    w: np.ndarray
    """[layers, d_in] float32."""
    b: float
    recipe: str = ""
    """How it was fitted, for the evidence."""

    @property
    def biases(self) -> tuple[float, ...]:
        """The bias of each layer's part."""
        return (self.b, *(0.0 for _ in self.layers[1:]))

    def logits(self, x: Mapping[int, torch.Tensor]) -> np.ndarray:
        """Return [tokens] float32 for the residuals `x` by layer, [tokens, d_in] each."""
        parts = [
            (x[layer] @ torch.from_numpy(w) + b).numpy()
            for layer, w, b in zip(self.layers, self.w, self.biases, strict=True)
        ]
        return term_values([Term(i, 1.0) for i in range(len(parts))], np.stack(parts, 1))


def read_probe(ref: ProbeRef, d_in: int) -> Probe:
    """Read one probe and check its shape.

    Raises:
        ProbeError: it cannot be read, is not finite, or its weight is not [layers, d_in].
    """
    try:
        with safe_open(ref.path, framework="pt") as file:
            w = file.get_tensor(f"{ref.name}.weight").float()
            b = file.get_tensor(f"{ref.name}.bias").float().reshape(())
    except (SafetensorError, OSError) as error:
        raise ProbeError(f"{ref.path}: no probe {ref.name!r}: {error}") from error
    layers = len(ref.layers)
    if list(w.shape) != [layers, d_in] and not (layers == 1 and list(w.shape) == [d_in]):
        wanted = f"[{d_in}]" if layers == 1 else f"[{layers}, {d_in}], a row for each layer"
        raise ProbeError(
            f"{ref.path}: {ref.name}.weight: found shape {list(w.shape)}, expected {wanted}"
        )
    if not (torch.isfinite(w).all() and torch.isfinite(b)):
        raise ProbeError(f"{ref.path}: {ref.name} is not finite")
    return Probe(ref.layers, w.reshape(layers, d_in).numpy(), float(b))


def save_probes(probes: dict[str, Probe], path: str | Path) -> dict[str, ProbeRef]:
    """Write `probes` to one safetensors file and return the references to them, by name."""
    file = real_path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, probe in probes.items():
        w = probe.w if len(probe.layers) > 1 else probe.w[0]
        tensors[f"{name}.weight"] = torch.from_numpy(w.copy())
        tensors[f"{name}.bias"] = torch.tensor(probe.b)
    save_file(tensors, file)
    digest = file_digest(file)
    return {name: ProbeRef(file, name, digest, probe.layers) for name, probe in probes.items()}
