"""The ROC curves of an evaluation, read from what `saeguard evaluate --json` wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from saeguard.evaluation import svg

SCHEMA = "saeguard.evaluation/v1"
SHOWN = 12
"""Charts at most; those with the most texts."""


class CurvesError(ValueError):
    """The file is no evaluation that can be drawn."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a chart."""

    name: str
    style: str
    auroc: float


@dataclass(frozen=True, slots=True)
class Chart:
    """One policy on one dataset, beside the baselines."""

    policy: str
    dataset: str
    positives: int
    negatives: int
    picture: Markup
    legend: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class Curves:
    """The charts of an evaluation."""

    source: str
    charts: tuple[Chart, ...]


def read_curves(path: Path, name: str) -> Curves:
    """Return the charts of an evaluation: each policy on the datasets of its behaviour.

    Args:
        path: JSON file.
        name: how the page calls it.

    Raises:
        CurvesError: it is not JSON of an evaluation, or its rows hold no curve.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        schema = found["schema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CurvesError(
            f"{name}: expected JSON of `saeguard evaluate --json`: {error}"
        ) from error
    if schema != SCHEMA:
        raise CurvesError(f"{name}: schema: found {schema!r}, expected {SCHEMA!r}")
    charts = [chart for dataset in found["datasets"] for chart in _charts(dataset)]
    if not charts:
        raise CurvesError(f"{name}: no dataset has a policy with a ROC curve; evaluate again")
    charts.sort(key=lambda c: -(c.positives + c.negatives))
    return Curves(name, tuple(sorted(charts[:SHOWN], key=lambda c: (c.policy, c.dataset))))


def _charts(dataset: Mapping[str, Any]) -> Iterator[Chart]:
    rows = dataset["rows"]
    for row in rows:
        if row["sort"] != "policy" or not row.get("roc"):
            continue
        others = [r for r in rows if r["sort"] != "policy" and r["reads"] == row["reads"]]
        shown = [r for r in (row, *others) if r.get("roc") and r["auroc"] is not None]
        yield Chart(
            row["name"],
            dataset["name"],
            dataset["positives"],
            dataset["negatives"],
            _draw(row["name"], dataset["name"], shown),
            tuple(Entry(r["name"], _style(r), r["auroc"]["value"]) for r in shown),
        )


def _draw(policy: str, dataset: str, rows: Sequence[Mapping[str, Any]]) -> Markup:
    picture = svg.plot(
        svg.shares("false positives among the negatives"),
        svg.shares("true positives"),
        curves=[svg.Curve(r["name"], _style(r), [(x, y) for x, y in r["roc"]]) for r in rows],
        diagonal=True,
        label=f"ROC curves: {policy} on {dataset}",
    )
    return Markup(picture)  # noqa: S704 - names are escaped where they enter


def _style(row: Mapping[str, Any]) -> str:
    if row["sort"] == "probe":
        return "probe-last" if "last" in row["name"] else "probe-mean"
    return str(row["sort"])
