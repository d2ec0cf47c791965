"""What an evaluation found: plain data, for the terminal, JSON and the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from saeguard.evaluation.curves import roc_points
from saeguard.evaluation.datasets import Dataset
from saeguard.evaluation.figures import Detector
from saeguard.evaluation.worst import Example
from saeguard.policy.types import Policy

SCHEMA = "saeguard.evaluation/v1"
ROC_POINTS = 48
"""Points of a ROC curve in JSON."""
OUTCOMES = ("match", "no_match", "not_evaluated", "error")


@dataclass(frozen=True, slots=True)
class Row:
    """One detector on one dataset."""

    detector: Detector
    figures: Mapping[str, Any]
    kinds: tuple[Mapping[str, Any], ...] = ()
    """Of a policy: the figures of each kind of positive."""
    outcomes: Mapping[str, Mapping[str, int]] | None = None
    """Of a policy: texts by verdict, of positives and of negatives."""
    policy: int | None = None
    """Index of the policy."""
    worst: tuple[Example, ...] = ()
    """Of a policy: the highest negatives and the lowest positives."""


@dataclass(frozen=True, slots=True)
class Section:
    """One dataset with everything that was measured on it."""

    dataset: Dataset
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    """Why a figure or baseline is missing."""


@dataclass(frozen=True, slots=True)
class Ordinary:
    """One policy on the ordinary texts."""

    score: np.ndarray
    """[texts evaluated]."""
    outcomes: Mapping[str, int]
    rate: Mapping[str, Any] | None
    """Of the texts evaluated, those that match; None if there are none."""
    files: tuple[Mapping[str, Any], ...]
    """The same of each file."""
    worst: tuple[Example, ...] = ()


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Everything that the report shows."""

    policies: tuple[Policy, ...]
    names: tuple[str, ...]
    """Of the policies: id, and mode if two share an id."""
    sections: tuple[Section, ...]
    ordinary: tuple[Ordinary, ...]
    """By policy; empty without ordinary texts."""
    benign: tuple[Dataset, ...]
    facts: Mapping[str, Any]
    """Model, versions, time, command."""


def no_verdict(row: Row) -> str:
    """Return how many texts were not evaluated or gave an error, empty if none."""
    if row.outcomes is None:
        left = row.detector.score.size - sum(row.figures["scored"].values())
        return f"{left} not scored" if left else ""
    total = {
        name: sum(counts[name] for counts in row.outcomes.values())
        for name in ("not_evaluated", "error")
    }
    return ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in total.items() if n)


def record(found: Evaluation) -> dict[str, Any]:
    """Return the report as JSON has it; it holds ids, and no text."""
    return {
        "schema": SCHEMA,
        **found.facts,
        "policies": [
            {
                "name": name,
                "title": policy.title,
                "digest": policy.digest,
                "mode": policy.mode,
                "action": policy.action,
                "scope": policy.scope,
                "feature_set": policy.feature_set,
                "benign": _ordinary(found.ordinary[i]) if found.ordinary else None,
            }
            for i, (name, policy) in enumerate(zip(found.names, found.policies, strict=True))
        ],
        "datasets": [
            {
                **_dataset(section.dataset),
                "notes": list(section.notes),
                "rows": [_row(row, section.dataset) for row in section.rows],
            }
            for section in found.sections
        ],
        "benign": [_dataset(dataset) for dataset in found.benign],
    }


def _dataset(dataset: Dataset) -> dict[str, Any]:
    positives, negatives = dataset.counts
    return {
        "name": dataset.name,
        "path": str(dataset.path),
        "sha256": dataset.sha256,
        "behaviour": dataset.behaviour,
        "positives": positives,
        "negatives": negatives,
        "templates": len(np.unique(dataset.template)),
    }


def _row(row: Row, dataset: Dataset) -> dict[str, Any]:
    roc = roc_points(row.detector, dataset.label, ROC_POINTS)
    out = {
        "name": row.detector.name,
        "sort": row.detector.sort,
        "reads": row.detector.part,
        "note": row.detector.note,
        **row.figures,
        "roc": [[round(false, 4), round(true, 4)] for false, true in roc],
    }
    if row.policy is not None:
        out["verdicts"] = row.outcomes
        out["kinds"] = list(row.kinds)
        out["worst"] = [_example(example) for example in row.worst]
    return out


def _ordinary(ordinary: Ordinary) -> dict[str, Any]:
    return {
        "verdicts": ordinary.outcomes,
        "rate": ordinary.rate,
        "files": list(ordinary.files),
        "worst": [_example(example) for example in ordinary.worst],
    }


def _example(example: Example) -> dict[str, Any]:
    score = example.score if np.isfinite(example.score) else None
    return {"id": example.id, "label": example.label, "score": score, "verdict": example.outcome}
