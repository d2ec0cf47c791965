"""Tables of what the guard costs a decode step, for `benchmarks/overhead.py`."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.overhead_engine import IDLE, PARTS

ROOT = Path(__file__).resolve().parent.parent


def machine() -> dict[str, Any]:
    """Return what the numbers were measured on."""
    model = platform.processor() or "unknown"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
        model = found.group(1).strip() if found else model
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
    }


def revision() -> str:
    """Return the git revision, marked where files differ from it."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],  # noqa: S607
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def rows_of(results: Mapping[str, Any]) -> Iterator[list[str]]:
    """Return the table's rows: batch, state, times, ratios, host time."""
    for batch, by_state in results["batches"].items():
        for state, r in by_state.items():
            ratio, low, high = r["step_ratio"]
            through, t_low, t_high = r["throughput_ratio"]
            yield [
                batch,
                state,
                f"{r['step_ms']:.1f}",
                "1" if state == IDLE else f"{ratio:.4f} [{low:.4f}, {high:.4f}]",
                "1" if state == IDLE else f"{through:.4f} [{t_low:.4f}, {t_high:.4f}]",
                f"{r['host_us']:.0f}",
                f"{100 * r['host_share']:.3f} %",
            ]


HEAD = ["batch", "guard", "step, ms", "step / idle", "throughput / idle", "host, µs", "of step"]


def part_rows(results: Mapping[str, Any]) -> Iterator[list[str]]:
    """Return the rows of the second table: host time by part."""
    for batch, by_state in results["batches"].items():
        for state, r in by_state.items():
            if state not in (IDLE, "idle again"):
                parts = [f"{r['parts_us'].get(p, 0):.0f}" for p in PARTS[:-1]]
                yield [batch, state, *parts, f"{r.get('finish_us_per_request', 0):.0f}"]


PART_HEAD = ["batch", "guard", *PARTS[:-1], "finish, once a request"]


def markdown(results: Mapping[str, Any]) -> str:
    """Return the tables as Markdown, with the conditions above them."""
    m, a = results["machine"], results["arguments"]
    latents = results["model"]["watch_list"]["d_sae"]

    def table(head: list[str], rows: Iterator[list[str]]) -> list[str]:
        ruler = ["---", "---", *["---:"] * (len(head) - 2)]
        return [f"| {' | '.join(cells)} |" for cells in [head, ruler, *rows]]

    lines = [
        (
            f"{m['cpu']}, {m['cores']} cores, {m['torch_threads']} threads; "
            f"vLLM {results['versions']['vllm']}, torch {results['versions']['torch']}, float32, "
            "compiled; "
            f"{results['model']['parameters'] / 1e6:.0f}M parameters; {a['rounds']} rounds of "
            f"{a['steps']} decode steps a state; medians, 95 % bootstrap intervals over rounds; "
            f"{results['date'][:10]}, {results['revision']}."
        ),
        "",
        *table(HEAD, rows_of(results)),
        "",
        "Host time of the guard a step by part, µs:",
        "",
        *table(PART_HEAD, part_rows(results)),
        "",
        "Beside it, on the same rows and threads, outside the engine:",
        "",
        *table(
            ["rows", "what", "µs"],
            (
                [str(r["rows"]), what, f"{r[key]:.0f}"]
                for r in results["reference"]
                for what, key in (
                    (f"full encode, {latents:,} latents", "full_us"),
                    ("32 watched rows", "watched_us"),
                )
            ),
        ),
        "",
        f"The op left in the graph of an idle engine: {results['idle_op_us']:.1f} µs a step.",
    ]
    return "\n".join(lines)


def show(results: Mapping[str, Any], console: Console) -> None:
    """Print the tables."""
    for title, head, rows in (
        ("Decode step", HEAD, rows_of(results)),
        ("Host time of the guard a step, µs", PART_HEAD, part_rows(results)),
    ):
        table = Table(*head, title=title)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    latents = results["model"]["watch_list"]["d_sae"]
    for r in results["reference"]:
        console.print(
            f"{r['rows']} rows: full encode of {latents:,} latents {r['full_us']:,.0f} µs, "
            f"32 watched rows {r['watched_us']:,.0f} µs"
        )
    console.print(f"op of an idle engine: {results['idle_op_us']:.1f} µs a step")
