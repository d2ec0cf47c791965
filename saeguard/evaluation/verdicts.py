"""Kept verdicts as arrays, and what they say of ordinary texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from saeguard.evaluation.datasets import Dataset
from saeguard.evaluation.figures import share
from saeguard.evaluation.results import OUTCOMES
from saeguard.evaluation.store import Store

EVALUATED = ("match", "no_match")


class Verdicts(NamedTuple):
    """One policy's verdicts on the texts of one dataset."""

    outcome: np.ndarray
    """[texts] str."""
    score: np.ndarray
    """[texts] float64. NaN: error or not evaluated. -inf: evaluated, but too short for a window."""
    tokens: int
    """In the policy's scope, of all texts."""
    evaluated: int

    @property
    def match(self) -> np.ndarray:
        """[texts] bool."""
        out: np.ndarray = self.outcome == "match"
        return out

    def counts(self, some: np.ndarray) -> dict[str, int]:
        """Return how many of the texts at the mask `some` have each verdict."""
        return {name: int((self.outcome[some] == name).sum()) for name in OUTCOMES}


def read_verdicts(store: Store, dataset: Dataset, key: str) -> Verdicts:
    """Return the verdicts that were kept; every text has one."""
    kept = [k for k in store.verdicts(dataset.digest, key) if k is not None]
    assert len(kept) == len(dataset), f"{dataset.name}: {len(dataset) - len(kept)} verdicts missing"
    score = [
        np.nan if k.outcome not in EVALUATED else -np.inf if k.score is None else k.score
        for k in kept
    ]
    return Verdicts(
        np.array([k.outcome for k in kept]),
        np.array(score, np.float64),
        sum(k.tokens for k in kept),
        sum(k.evaluated for k in kept),
    )


def firing_rate(
    verdicts: Sequence[Verdicts], datasets: Sequence[Dataset]
) -> tuple[dict[str, int], dict[str, Any] | None, list[dict[str, Any]]]:
    """Return verdict counts, the rate of matches among evaluated texts, and both by file.

    Args:
        verdicts: of one policy, by dataset.
        datasets: of ordinary texts.
    """
    files = []
    total = dict.fromkeys(OUTCOMES, 0)
    for found, dataset in zip(verdicts, datasets, strict=True):
        counts = found.counts(np.ones(len(dataset), bool))
        total = {name: total[name] + counts[name] for name in OUTCOMES}
        files.append({"name": dataset.name, "verdicts": counts, "rate": rate_of(counts)})
    return total, rate_of(total), files


def rate_of(counts: dict[str, int]) -> dict[str, Any] | None:
    """Return the share of evaluated texts that match."""
    return share(counts["match"], sum(counts[name] for name in EVALUATED))
