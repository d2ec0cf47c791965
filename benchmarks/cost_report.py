"""Plots of ratios with their intervals, for `benchmarks/serve.py` and `benchmarks/peers.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

METRICS = {
    "output_throughput": "output tokens a second",
    "p50_ttft_ms": "time to the first token, median",
    "p50_itl_ms": "time between tokens, median",
    "p99_itl_ms": "time between tokens, 99th percentile",
}
"""What `benchmarks/serve.py` compares: keys of vLLM's own result."""


def plot_peers(results: Mapping[str, Any], path: Path) -> None:
    """Draw each engine's time an output token as a ratio to plain vLLM, by batch."""
    rows = [
        (f"{kind}, batch {batch}", found["ratio"])
        for batch, kinds in results["batches"].items()
        for kind, found in kinds.items()
        if kind != "plain"
    ]
    _plot([("time an output token / plain vLLM", rows)], path)


def plot_serve(results: Mapping[str, Any], path: Path) -> None:
    """Draw what a client sees of each server as a ratio to the unguarded server."""
    panels = [
        (
            f"{title} / unguarded",
            [(state, found["ratio"][metric]) for state, found in results["servers"].items()],
        )
        for metric, title in METRICS.items()
    ]
    _plot(panels, path)


def _plot(panels: Sequence[tuple[str, Sequence[tuple[str, Sequence[float]]]]], path: Path) -> None:
    import matplotlib as mpl  # noqa: PLC0415 - an extra

    mpl.use("Agg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": path.stem, "font.size": 8})
    from matplotlib import pyplot as plt  # noqa: PLC0415

    height = 0.6 + 0.28 * max(len(rows) for _, rows in panels)
    figure, axes = plt.subplots(len(panels), 1, figsize=(7, height * len(panels)), squeeze=False)
    for axis, (title, rows) in zip(axes.flat, panels, strict=True):
        for at, (_, (value, low, high)) in enumerate(reversed(rows)):
            axis.plot([low, high], [at, at], color="C0", linewidth=2, alpha=0.5)
            axis.plot([value], [at], "o", color="C0", markersize=4)
        axis.set_yticks(range(len(rows)), [name for name, _ in reversed(rows)])
        axis.axvline(1.0, linestyle=":", color="grey")
        axis.set_title(title)
        axis.grid(alpha=0.3, axis="x")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
