"""Linear probes on the residual: `x @ w + b`, one more encoder row without activation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from saeguard.errors import InputError
from saeguard.features.pins import file_digest
from saeguard.features.types import ProbeRef


class ProbeError(InputError):
    """A probe file is missing, damaged, or of another width."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A fitted probe in the units of the residual."""

    w: np.ndarray
    """[d_in] float32."""
    b: float
    recipe: str
    """How it was fitted, for the evidence."""

    def logits(self, x: torch.Tensor) -> np.ndarray:
        """Return [tokens] float32 for `x` [tokens, d_in]."""
        out: np.ndarray = (x @ torch.from_numpy(self.w) + self.b).numpy()
        return out


def read_probe(ref: ProbeRef, d_in: int) -> Probe:
    """Read one probe and check its width.

    Raises:
        ProbeError: it cannot be read, is not finite, or its width is not `d_in`.
    """
    try:
        with safe_open(ref.path, framework="pt") as file:
            w = file.get_tensor(f"{ref.name}.weight").float().reshape(-1)
            b = file.get_tensor(f"{ref.name}.bias").float().reshape(())
    except (SafetensorError, OSError) as error:
        raise ProbeError(f"{ref.path}: no probe {ref.name!r}: {error}") from error
    if len(w) != d_in:
        raise ProbeError(f"{ref.path}: {ref.name}.weight has {len(w)} entries, not {d_in}")
    if not (torch.isfinite(w).all() and torch.isfinite(b)):
        raise ProbeError(f"{ref.path}: {ref.name} is not finite")
    return Probe(w.numpy(), float(b), "")


def save_probes(probes: dict[str, Probe], path: str | Path) -> dict[str, ProbeRef]:
    """Write `probes` to one safetensors file and return the references to them, by name."""
    file = Path(path).resolve()
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, probe in probes.items():
        tensors[f"{name}.weight"] = torch.from_numpy(probe.w.copy())
        tensors[f"{name}.bias"] = torch.tensor(probe.b)
    save_file(tensors, file)
    digest = file_digest(file)
    return {name: ProbeRef(file, name, digest) for name in probes}
