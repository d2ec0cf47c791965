"""Encoders side by side in one process: ours, SAELens', sparsify's, and the bare matrix product.

`make bench-encode` measures every size, prints ratios, keeps each case in `results/encode.json` as
soon as it is measured, and writes the tables and the plot of docs/encoding.md. Contestants take
turns in random order, round by round, and what is compared are the ratios within a round, so that
what else runs on the machine meets all of them. `--resume` keeps the cases that are there.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import random
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import encode_cases as cases
from benchmarks.encode_cases import TOKENS, WIDTHS, Call, Weights
from benchmarks.encode_report import FLOOR, document, line

ROOT = Path(__file__).parents[1]
NAMES = {"16k": 16_384, "65k": 65_536, "262k": 262_144, "1M": 1_048_576}
WATCHED = (1, 32, 256, 1024)
ROUNDS = 31
"""At most."""
SHORT, OFTEN = 0.02, 7
"""Calls of fewer seconds have so many turns a round."""


def settled(device: str) -> float:
    """Return the time, once the device has nothing left to do."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def turns(calls: dict[str, Call], device: str, seconds: float, least: int) -> dict[str, Any]:
    """Return each call's `wall` and `cpu` seconds, [rounds] each; the calls take turns.

    A short call has several turns in a round, of which the median counts: what it takes depends on
    what the call before it left in the processor's caches.
    """
    spent: dict[str, Any] = {name: {"wall": [], "cpu": []} for name in calls}
    rng = random.Random(0)
    took = {name: timed(calls[name], device)["wall"] for name in calls}
    order = [name for name in calls for _ in range(1 if took[name] > SHORT else OFTEN)]
    began = settled(device)
    for round_ in range(ROUNDS):
        if round_ >= least and settled(device) - began > seconds:
            break
        rng.shuffle(order)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
        for name in order:
            found[name].append(timed(calls[name], device))
        for name, clocks in spent.items():
            for clock, times in clocks.items():
                times.append(float(np.median([one[clock] for one in found[name]])))
    return spent


def timed(call: Call, device: str) -> dict[str, float]:
    """Return what a call takes by both clocks, in seconds."""
    wall, cpu = settled(device), time.process_time()
    call()
    return {"wall": settled(device) - wall, "cpu": time.process_time() - cpu}


def summary(spent: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Return median seconds, and ratios with intervals, by both clocks.

    The cost of screening where one token in a thousand passes is that of the calls in which none
    does and in which some do, weighted.
    """
    out: dict[str, Any] = {"rounds": len(spent["product"]["wall"]), "seconds": {}, "ratios": {}}
    for clock in ("wall", "cpu"):
        took = {name: np.array(times[clock]) for name, times in spent.items()}
        share = min(1.0, tokens / cases.ONE_IN / max(1, tokens // cases.ONE_IN))
        for name in [name for name in took if name.startswith("passed ")]:
            watched = name.split()[1]
            took[f"thousandth {watched}"] = (
                share * took[name] + (1 - share) * took[f"screened {watched}"]
            )
        pairs = {name: FLOOR[name] for name in took if name in FLOOR}
        ratios = {f"{name} / {floor}": took[name] / took[floor] for name, floor in pairs.items()}
        ratios["saelens / saeguard"] = took["saelens"] / took["saeguard"]
        for name, times in took.items():
            kind, _, watched = name.partition(" ")
            if kind == "watched":
                ratios[f"saelens / {name}"] = took["saelens"] / times
            if kind in {"screened", "passed", "thousandth"}:
                ratios[f"{name} / watched {watched}"] = times / took[f"watched {watched}"]
        out["seconds"][clock] = {n: float(f"{np.median(t):.4g}") for n, t in took.items()}
        out["ratios"][clock] = {name: interval(values) for name, values in ratios.items()}
    return out


def interval(values: np.ndarray) -> list[float]:
    """Return the median and the ends of its 95 % bootstrap interval."""
    drawn = np.random.default_rng(0).choice(values, (1000, len(values)))
    ends = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return [float(f"{value:.4g}") for value in (np.median(values), *ends)]


def peak_mib(call: Call, device: str) -> float | None:
    """Return by how much a call raises memory at most: resident memory on Linux, or the GPU's."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    except OSError:
        return None
    resident = _status("VmRSS")
    call()
    return round((_status("VmHWM") - resident) / 1024, 1)


def _status(key: str) -> int:
    for row in Path("/proc/self/status").read_text().splitlines():
        if row.startswith(key):
            return int(row.split()[1])
    raise KeyError(key)


@torch.no_grad()
def measure(args: argparse.Namespace, weights: Weights, width: int, tokens: int) -> dict[str, Any]:
    """Measure one size, watched rows included."""
    case: dict[str, Any] = {"width": width, "d_in": WIDTHS[width], "tokens": tokens}
    case |= {"when": dt.datetime.now(dt.UTC).isoformat(timespec="minutes"), "load": [load()]}
    x = torch.randn(tokens, WIDTHS[width], device=args.device)
    calls = cases.full_width(weights, x)
    for watched in args.watched:
        calls |= cases.watched_rows(weights, x, watched)
    library = cases.pieces(x, width, cases.LIBRARY_GIB / cases.TEMPORARIES)
    case["library_calls"] = len(library)
    # The first call of each is not timed: it allocates, compiles and finds cold caches.
    case["peak_mib"] = {name: peak_mib(call, args.device) for name, call in calls.items()}
    spent = turns(calls, args.device, args.seconds, args.least)
    case |= summary(spent, tokens)
    case["load"].append(load())
    return case


def load() -> float:
    """Return how many processes wanted a core in the last minute."""
    return float(Path("/proc/loadavg").read_text().split()[0])


def conditions(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the figures depend on, beside the load, which each case tells."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((row.split(":")[1].strip() for row in info if row.startswith("model name")), None)
    git = ["git", "rev-parse", "--short", "HEAD"]
    revision = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False)
    packages = ("torch", "numpy", "sae-lens", "eai-sparsify")
    return {
        "cpu": cpu or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in packages},
        "revision": revision.stdout.strip(),
        "arguments": {k: v for k, v in vars(args).items() if k not in {"out", "docs"}},
    }


def arguments() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    def widths(text: str) -> list[int]:
        return [NAMES[part] if part in NAMES else int(part) for part in text.split(",")]

    parser.add_argument("--widths", type=widths, default=list(WIDTHS), help="as " + ",".join(NAMES))
    parser.add_argument("--tokens", type=numbers, default=list(TOKENS))
    parser.add_argument("--watched", type=numbers, default=list(WATCHED))
    parser.add_argument("--threads", type=int, default=1, help="default 1: the surest to compare")
    parser.add_argument("--seconds", type=float, default=6.0, help="of rounds, for a size")
    parser.add_argument("--least", type=int, default=3, help="rounds, for a size")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--resume", action="store_true", help="keep the sizes that are in --out")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/encode.json")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="tables and plot go there")
    parser.add_argument("--report-only", action="store_true", help="measure nothing, write docs")
    args = parser.parse_args()
    for width in args.widths:
        if width not in WIDTHS:
            parser.error(f"--widths: {width} is none of {', '.join(NAMES)}")
    return args


def main() -> None:
    """Measure what is asked for, one case after the other, and write it down."""
    args = arguments()
    console = Console()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    done = json.loads(args.out.read_text())["cases"] if args.out.exists() else []
    found = {(case["width"], case["tokens"]): case for case in done}
    wanted = [(width, tokens) for width in args.widths for tokens in args.tokens]
    if args.report_only:
        document(json.loads(args.out.read_text()), args.docs)
        return
    if args.resume:
        wanted = [size for size in wanted if size not in found]
    about = conditions(args)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task, weights, held = progress.add_task("", total=len(wanted)), None, 0
        for width, tokens in wanted:
            progress.update(task, description=f"{width:,} latents, {tokens:,} tokens")
            if width != held:
                weights = None  # before the next are made
                weights, held = cases.make_weights(width, max(args.watched), args.device), width
            assert weights is not None
            case = measure(args, weights, width, tokens)
            found[width, tokens] = case | {"about": about}
            result = {"cases": [found[size] for size in sorted(found)]}
            args.out.write_text(json.dumps(result, indent=1) + "\n")
            console.print(line(case), soft_wrap=True)
            progress.advance(task)
    document({"cases": [found[size] for size in sorted(found)]}, args.docs)


if __name__ == "__main__":
    main()
