"""What the page shows: an index, the feature set and policies over it, and an event log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock

import numpy as np
import torch

from saeguard.errors import InputError
from saeguard.events.record_schema import Event
from saeguard.features.types import Feature, FeatureSet
from saeguard.latents.index import Index
from saeguard.latents.neighbours import Neighbour, flat_map, unit_rows
from saeguard.policy.types import Policy
from saeguard.sae import SaeInfo

NEIGHBOURS = 12
MAPPED = 60
"""Neighbours on the map."""


class NotThereError(InputError):
    """There is no such latent, feature, policy or event."""


@dataclass(frozen=True)
class Site:
    """Everything that views read."""

    index: Index
    info: SaeInfo | None = None
    """The SAE, for neighbours."""
    features: FeatureSet | None = None
    policies: Sequence[Policy] = ()
    """Those that read the feature set."""
    events: Sequence[Event] = ()
    _mapping: Lock = field(default_factory=Lock)

    @cached_property
    def used_by(self) -> Mapping[int, Sequence[tuple[Feature, float, str]]]:
        """For each latent the features that use it, with the weight and for what."""
        out: dict[int, list[tuple[Feature, float, str]]] = {}
        for feature in {} if self.features is None else self.features.features.values():
            for term in feature.detect:
                out.setdefault(term.latent, []).append((feature, term.weight, "detect"))
            for term in feature.clamp:
                out.setdefault(term.latent, []).append((feature, term.weight, "clamp"))
        return out

    def policies_of(self, feature: str) -> list[Policy]:
        """Return the policies that read a feature."""
        return [p for p in self.policies if any(s.feature == feature for s in p.detect.values())]

    @cached_property
    def _rows(self) -> torch.Tensor:
        assert self.info is not None
        return unit_rows(self.info, range(self.info.d_sae))

    def neighbours(self, latent: int, most: int = NEIGHBOURS) -> list[Neighbour]:
        """Return the latents whose decoder rows are nearest; none without an SAE.

        All decoder rows are in memory after the first call, 4 bytes times latents times width.
        """
        if self.info is None or self.info.transcoder:
            return []
        near = self._rows @ self._rows[latent]
        near[latent] = -torch.inf
        values, at = near.topk(min(most, len(near) - 1))
        return [Neighbour(int(i), float(v)) for i, v in zip(at, values, strict=True)]

    def map_of(self, latent: int) -> list[tuple[int, float, float]]:
        """Return a latent and its neighbours with their places on a plane, -1 to 1."""
        near = [latent, *(n.latent for n in self.neighbours(latent, MAPPED))]
        if len(near) == 1:
            return [(latent, 0.0, 0.0)]
        with self._mapping:  # UMAP compiles itself when it is first used
            places = flat_map(self._rows[near])
        return [(i, float(x), float(y)) for i, (x, y) in zip(near, places, strict=True)]

    @cached_property
    def dead(self) -> int:
        """Number of latents that fire nowhere on the corpus."""
        ((count,),) = self.index.rows("SELECT count(*) FROM latent WHERE tokens = 0")
        return int(count)

    @cached_property
    def file_of_text(self) -> np.ndarray:
        """[texts] index of the corpus's file that each text is from."""
        counts = [part["texts"] for part in self.index.about["corpus"]]
        return np.repeat(np.arange(len(counts)), counts)

    @cached_property
    def files(self) -> list[str]:
        """The corpus's files, by name without suffix."""
        return [part["file"].removesuffix(".jsonl") for part in self.index.about["corpus"]]
