"""The families of checkpoints that are read, each by the set of files it is published in.

| family | files | module |
|---|---|---|
| SAELens | `cfg.json`, `sae_weights.safetensors` | `saelens` |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from saeguard.sae.formats import saelens
from saeguard.sae.formats.source import Source
from saeguard.sae.info import SaeInfo

__all__ = ["FAMILIES", "Family"]


@dataclass(frozen=True, slots=True)
class Family:
    """One way in which SAEs are published."""

    title: str
    weights: str
    """Relative to the checkpoint's folder, as `config`."""
    config: str | None
    describe: Callable[[Source], SaeInfo]

    @property
    def files(self) -> tuple[str, ...]:
        """The files that a folder must hold."""
        return (self.weights,) if self.config is None else (self.config, self.weights)


FAMILIES: tuple[Family, ...] = (
    Family("SAELens checkpoints", saelens.WEIGHTS, saelens.CONFIG, saelens.describe),
)
