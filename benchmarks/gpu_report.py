"""What `benchmarks/gpu.py` found, as tables: from the file of records, finished or cut off."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.gpu_engines import STATES
from benchmarks.gpu_record import FAILED, HELD, NOT_RUN, Record

STEPS = ("step_us", "device_us", "graph_us")
"""Of a decode step: the host's clock; the device from its first to its last work; its graphs."""


def show(records: Sequence[Record], console: Console) -> None:
    """Print all tables, what did not hold last."""
    for record in records:
        if "conditions" in record:
            for name, value in record["conditions"].items():
                console.print(f"{name}: {value}", soft_wrap=True, highlight=False)
    rows = [r for r in records if "case" in r]
    _print(console, "Kernels, µs", _times(rows))
    _print(console, "Engines", _starts(rows))
    _print(console, "Texts", _texts(rows))
    _print(console, "Decode steps, µs: medians over rounds", _steps(rows))
    _print(console, "Pieces", _pieces(records))
    for row in rows:
        if row.get("held") is False:
            error = str(row.get("error", "")).strip().splitlines() or ["it does not hold"]
            console.print(f"FAILED {row['piece']}: {row['case']}: {error[-1]}", soft_wrap=True)


def _print(console: Console, title: str, rows: Iterable[Sequence[Any]]) -> None:
    head, *body = [[_cell(cell) for cell in row] for row in rows]
    if not body:
        return
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(head):
        table.add_column(name, justify="left" if i < 1 else "right", overflow="fold")
    for row in body:
        table.add_row(*row)
    console.print(table)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,.1f}" if isinstance(value, float) else str(value)


def _times(rows: Sequence[Record]) -> Iterable[Sequence[Any]]:
    yield "kernel", "cold", "warm", "to launch", "copy", "product", "of the ceiling"
    for r in rows:
        if "of_ceiling" in r:
            first = r.get("cold_us", r.get("host_us"))
            kernel = f"{r['piece'].split(',')[0]}: {r['case']}"
            more = (r.get(k) for k in ("warm_us", "launch_us", "copy_us", "product_us"))
            yield kernel, first, *more, r["of_ceiling"]


def _starts(rows: Sequence[Record]) -> Iterable[Sequence[Any]]:
    yield "engine", "up after, s", "graphs", "self-test: difference", "allowed"
    for r in rows:
        if "start_s" in r:
            tests = r["self_test"]
            told = [", ".join(f"{t[k]:.2g}" for t in tests) for k in ("difference", "allowed")]
            yield r["case"], r["start_s"], r["graphs"], *told


def _texts(rows: Sequence[Record]) -> Iterable[Sequence[Any]]:
    yield "engine", "texts", "as unguarded", "flagged", "clamped", "against Transformers"
    for r in rows:
        if "same" in r:
            yield (r["case"], r["texts"], r["same"], r["flagged"], r["clamped"], None)
        if "worst_gap" in r:
            told = (
                f"{r['tokens']} tokens, worst gap {r['worst_gap']:.2g} of {r['near']} allowed, "
                f"{r['texts_changed']} texts changed"
            )
            yield r["case"], None, None, None, None, told


def _steps(rows: Sequence[Record]) -> Iterable[Sequence[Any]]:
    yield (
        "engine",
        "batch",
        "step",
        "to plain",
        "device",
        "graphs",
        "to plain",
        "replays",
        "guard's host",
    )
    blocks: dict[tuple[str, int, str], list[Record]] = {}
    for r in rows:
        if "step_us" in r and r["round"] > 0:
            blocks.setdefault((r["runner"], r["batch"], r["guard"]), []).append(r)
    for (runner, batch, guard), some in sorted(
        blocks.items(), key=lambda item: (*item[0][:2], STATES.index(item[0][2]))
    ):
        step, device, graph = (_median(some, key) for key in STEPS)
        plain = blocks.get((runner, batch, "plain"), [])
        parts = [
            sum(v for k, v in r.get("parts_us", {}).items() if k != "engine.finish") for r in some
        ]
        yield (
            f"{runner} {guard}",
            batch,
            step,
            _more(step, _median(plain, "step_us")),
            device,
            graph,
            _more(graph, _median(plain, "graph_us")),
            _median(some, "replays_a_step"),
            statistics.median(parts),
        )


def _median(rows: Sequence[Record], key: str) -> float | None:
    values = [r[key] for r in rows if r.get(key) is not None]
    return statistics.median(values) if values else None


def _more(value: float | None, plain: float | None) -> str | None:
    return f"{value - plain:+,.1f}" if value is not None and plain is not None else None


def _pieces(records: Sequence[Record]) -> Iterable[Sequence[Any]]:
    yield "piece", "part", "cases", "held", "seconds", "state"
    for (part, piece), state in outcomes(records).items():
        mine = [r for r in records if r.get("piece") == piece and r.get("part") == part]
        cases = [r for r in mine if "case" in r]
        held = sum(r.get("held", True) for r in cases)
        seconds = next((r["seconds"] for r in mine if "seconds" in r), None)
        yield piece, part, len(cases), held, seconds, state


def outcomes(records: Iterable[Record]) -> dict[tuple[str, str], str]:
    """Return the state of each piece by part and name; of what began and never ended, `failed`."""
    found: dict[tuple[str, str], str] = {}
    for r in records:
        for piece in r.get("pieces", ()):  # what was to be run
            found.setdefault((r["part"], piece), NOT_RUN)
        if "state" in r:
            found[r["part"], r["piece"]] = FAILED if r["state"] == "began" else r["state"]
    return found


def status(records: Iterable[Record]) -> int:
    """Return the exit status: 0 all held; 1 something did not; 3 time ran out, the rest held."""
    states = set(outcomes(records).values())
    if FAILED in states:
        return 1
    return 0 if states <= {HELD} else 3
