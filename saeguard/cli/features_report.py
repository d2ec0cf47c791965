"""What `saeguard features` prints: findings of a search, and the norms of residuals."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from saeguard.features.massive import MeasuredNorms
    from saeguard.features.search import Search
    from saeguard.features.types import Feature


def print_unlabelled(names: Sequence[str]) -> None:
    """Print the features that no labelled texts were given for."""
    if names:
        typer.echo(f"Not calibrated with labels, for want of files: {', '.join(names)}.")


def print_thresholds(done: Mapping[str, Feature]) -> None:
    """Print calibrated thresholds with their rates, and what speaks against them."""
    from saeguard.features.weakness import weaknesses

    for name, feature in done.items():
        measured = feature.evidence.get("fpr_holdout", feature.evidence["fpr_calibration"])
        low, high = measured["interval"]
        typer.echo(
            f"{name}: threshold {feature.threshold:g}, ordinary texts above it "
            f"{measured['rate']:.2%} ({low:.2%} to {high:.2%} of {measured['texts']})"
        )
        for reason in weaknesses(feature, feature.threshold, feature.evidence["window"]):
            typer.echo(f"{name}: warning: {reason}", err=True)


def print_norms(bounds: Mapping[int, float], norms: Mapping[int, MeasuredNorms]) -> None:
    """Print which tokens are left out as attention sinks, by layer."""
    for layer, measured in norms.items():
        typer.echo(f"layer {layer}: {measured.in_words(bounds[layer])}")
        if doubt := measured.doubt(bounds[layer]):
            typer.echo(f"layer {layer}: {doubt}")


def print_findings(found: Search, title: str) -> None:
    """Print the findings of a search as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "form", "made of", "AUROC search", "AUROC folds", "AUROC hold-out", "95 %", title=title
    )
    for finding in found.findings:
        low, high = finding.interval
        table.add_row(
            finding.form,
            finding.name,
            f"{finding.auroc_search:.3f}",
            "" if finding.auroc_validation is None else f"{finding.auroc_validation:.3f}",
            f"{finding.auroc_holdout:.3f}",
            f"{low:.3f} to {high:.3f}",
        )
    Console().print(table)
