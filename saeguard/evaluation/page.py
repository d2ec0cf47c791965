"""The report as one page that loads nothing: figures, charts, and texts with coloured tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup

from saeguard.evaluation import svg
from saeguard.evaluation.curves import Groups, firing, histogram, roc_points, score_range
from saeguard.evaluation.datasets import Dataset
from saeguard.evaluation.results import Evaluation, Row, Section, no_verdict
from saeguard.evaluation.worst import Example

HERE = Path(__file__).parent
STRONG = 1.5
"""Evidence at which a token has its full colour; 1 is the threshold."""
CURVES = 6
"""Detectors of one ROC chart at most."""


class Run(NamedTuple):
    """Consecutive tokens of one look."""

    text: str
    heat: int
    """0 to 100."""
    style: str
    tip: str


class Charts(NamedTuple):
    """The charts of one policy on one dataset."""

    roc: Markup | None
    legend: Sequence[tuple[str, str, float]]
    """Name, class and AUROC of each curve."""
    scores: Markup
    rates: Markup


def render(found: Evaluation) -> str:
    """Return the page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"pct": percent, "style": style_of, "lacks": no_verdict}
    template = environment.get_template("report.html.j2")
    return template.render(
        found=found,
        charts=lambda section, row: charts(found, section, row),
        forest=forest,
        runs=runs,
        templates=lambda dataset: len(np.unique(dataset.template)),
        groups=_grouped,
        all_texts=lambda datasets: sum(map(len, datasets)),
    )


def percent(figure: dict[str, Any] | None, digits: int = 1) -> str:
    """Return `12.5 %`, a dash without a figure."""
    return "\u2013" if figure is None else f"{100 * figure['value']:.{digits}f} %"


def style_of(row: Row) -> str:
    """Return the class that gives a row and its curve their colour."""
    sort = row.detector.sort
    if sort == "probe":
        return "probe-last" if "last" in row.detector.name else "probe-mean"
    return sort


def forest(figure: dict[str, Any] | None, style: str, low: float, high: float) -> Markup:
    """Return a figure with its interval as a picture, nothing without a figure."""
    if figure is None:
        return Markup()
    interval = (figure["interval"][0], figure["interval"][1])
    return Markup(svg.forest(figure["value"], interval, style, low, high))  # noqa: S704 - of numbers


def charts(found: Evaluation, section: Section, row: Row) -> Charts:
    """Return the charts of a policy's row."""
    label = section.dataset.label
    groups = _groups_of(found, section.dataset, row)
    others = [r for r in section.rows if _compares(r, row, found.policies[row.policy or 0].id)]
    shown = [r for r in (row, *others) if r.figures["auroc"] is not None][:CURVES]
    curves = [svg.Curve(r.detector.name, style_of(r), roc_points(r.detector, label)) for r in shown]
    name = f"{row.detector.name} on {section.dataset.name}"
    roc = svg.plot(
        svg.shares("false positives among the negatives"),
        svg.shares("true positives"),
        curves=curves,
        diagonal=True,
        label=f"ROC curves: {name}",
    )
    low, high = score_range(groups)
    bars = [
        svg.Bars(text, style, histogram(scores, low, high))
        for text, style, scores in _named(groups)
        if len(scores)
    ]
    tallest = max((max(bar.heights) for bar in bars), default=1.0)
    scores = svg.plot(
        svg.linear("score, the threshold is 1", low, high),
        svg.Axis("share of texts", 0, tallest * 1.08, [(0, "0"), (tallest, f"{tallest:.0%}")]),
        bars=bars,
        threshold=1.0,
        label=f"distribution of scores: {name}",
    )
    rates = svg.plot(
        svg.linear("threshold on the score, today's is 1", low, high),
        svg.log_shares("texts above it"),
        curves=[svg.Curve(t, style, firing(s, low, high)) for t, style, s in _named(groups)],
        threshold=1.0,
        label=f"what another threshold would give: {name}",
    )
    return Charts(
        Markup(roc) if curves else None,  # noqa: S704 - names are escaped where they enter
        [(r.detector.name, style_of(r), r.figures["auroc"]["value"]) for r in shown],
        Markup(scores),  # noqa: S704 - as above
        Markup(rates),  # noqa: S704 - as above
    )


def _compares(other: Row, row: Row, policy: str) -> bool:
    """Return whether a row is a baseline that reads what the policy reads, or answers for it."""
    if other.detector.sort == "judge":
        return other.detector.name == f"judge, {policy}"
    return other.policy is None and other.detector.part == row.detector.part


def _groups_of(found: Evaluation, dataset: Dataset, row: Row) -> Groups:
    scored = ~np.isnan(row.detector.score)
    ordinary = found.ordinary[row.policy or 0].score if found.ordinary else np.empty(0)
    score = row.detector.score
    return Groups(score[scored & dataset.label], score[scored & ~dataset.label], ordinary)


def _named(groups: Groups) -> list[tuple[str, str, np.ndarray]]:
    return [
        ("positives", "positive", groups.positives),
        ("negatives", "negative", groups.negatives),
        ("ordinary texts", "benign", groups.benign),
    ]


def _grouped(row: Row) -> tuple[list[Example], list[Example]]:
    """Return a row's examples: the highest negatives, and the missed positives."""
    return [e for e in row.worst if not e.label], [e for e in row.worst if e.label]


def runs(example: Example) -> list[Run]:
    """Return an example's tokens, with neighbours of one look joined."""
    out: list[Run] = []
    for piece in example.pieces:
        evidence = piece.evidence
        heat = 0 if evidence is None else round(100 * min(max(evidence, 0) / STRONG, 1))
        style = "unread" if evidence is None else "over" if evidence > 1 else ""
        plain = heat == 0 and style != "over"
        if plain and out and out[-1].heat == 0 and out[-1].style == style:
            out[-1] = out[-1]._replace(text=out[-1].text + piece.text)
        else:
            tip = "" if evidence is None or plain else f"{evidence:.2f} of the threshold"
            out.append(Run(piece.text, heat, style, tip))
    return out
