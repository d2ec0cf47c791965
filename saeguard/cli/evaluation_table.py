"""Print an evaluation in the terminal: one table per dataset, and one for ordinary texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

    from saeguard.evaluation.results import Evaluation, Row, Section

NONE = "-"


def show(found: Evaluation) -> None:
    """Print the tables."""
    from rich.console import Console

    console = Console()
    for table in tables(found):
        console.print(table)


def tables(found: Evaluation) -> Iterator[RenderableType]:
    """Yield what is printed, in order."""
    from saeguard.evaluation.results import no_verdict

    for section in found.sections:
        if section.rows:
            yield _section(section, ordinary=bool(found.benign))
        for row in section.rows:
            yield from (f"  {_name(row)}: {x}" for x in (row.detector.note, no_verdict(row)) if x)
        for note in section.notes:
            yield f"  {section.dataset.name}: {note}"
    if found.ordinary:
        yield _ordinary(found)


def _section(section: Section, *, ordinary: bool) -> RenderableType:
    from rich import box
    from rich.table import Table

    positives, negatives = section.dataset.counts
    table = Table(
        title=f"{section.dataset.name}: {positives} positives, {negatives} negatives",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("", overflow="fold", min_width=19)
    table.add_column("AUROC [95 %]", no_wrap=True)
    for name in ("pairs", "TPR", "FPR", *(("TPR@1%", "TPR@.1%") if ordinary else ())):
        table.add_column(name, justify="right", no_wrap=True)
    for row in section.rows:
        figures = row.figures
        at_benign = [percent(v) for v in figures["at_benign"].values()] if ordinary else []
        table.add_row(
            _name(row),
            area(figures["auroc"]),
            number(figures["pairs"]),
            percent(figures["tpr"]),
            percent(figures["fpr"]),
            *at_benign,
            style="" if row.policy is not None else "dim",
        )
    return table


def _ordinary(found: Evaluation) -> RenderableType:
    from rich import box
    from rich.table import Table

    texts = sum(len(dataset) for dataset in found.benign)
    table = Table(
        title=f"{texts} ordinary texts",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("", overflow="fold")
    for name in ("firing rate [95 %]", "texts", "not evaluated", "error"):
        table.add_column(name, justify="right")
    for name, ordinary in zip(found.names, found.ordinary, strict=True):
        rate = ordinary.rate
        shown = NONE
        if rate is not None:
            low, high = rate["interval"]
            shown = f"{rate['value']:.2%} [{low:.1%}, {high:.1%}]"
        table.add_row(
            name,
            shown,
            f"{rate['hits']} of {rate['texts']}" if rate else NONE,
            str(ordinary.outcomes["not_evaluated"]),
            str(ordinary.outcomes["error"]),
        )
    return table


def _name(row: Row) -> str:
    part = {"output": "", "prompt": " (prompt)", "both": " (all)"}[row.detector.part]
    return f"{row.detector.name}{part}"


def area(figure: Mapping[str, Any] | None) -> str:
    """Return `0.84 [0.79, 0.88]`."""
    if figure is None:
        return NONE
    low, high = figure["interval"]
    return f"{figure['value']:.2f} [{low:.2f}, {high:.2f}]"


def number(figure: Mapping[str, Any] | None) -> str:
    """Return `0.84`."""
    return NONE if figure is None else f"{figure['value']:.2f}"


def percent(figure: Mapping[str, Any] | None) -> str:
    """Return `12.5%`."""
    return NONE if figure is None else f"{figure['value']:.1%}"
