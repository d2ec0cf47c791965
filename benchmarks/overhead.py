"""What the guard costs a decode step of the real vLLM engine, and where that time goes.

`python -m benchmarks.overhead` (`make bench`); `--tiny` for a look whether it works. One engine,
one process, one batch of requests: the guard's state is switched between blocks of a few steps, in
random order within each round, so that drift of a shared machine falls on all states alike. See
README.md beside this file.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.cost_tables import document
from benchmarks.overhead_engine import (
    IDLE,
    MAX_LENGTH,
    MEANING,
    PARTS,
    SPENT,
    STATES,
    Bench,
    build,
    timed_parts,
)
from benchmarks.overhead_model import FULL, TINY, Size
from benchmarks.overhead_report import machine, markdown, revision, show


@dataclass
class Sample:
    """One block of steps under one state."""

    step_s: list[float]
    parts_us: dict[str, float]
    """Host time a step, by part."""


def measure(
    bench: Bench, batch: int, args: argparse.Namespace, tick: Callable[[], None]
) -> tuple[dict[str, list[Sample]], dict[str, dict[str, int]]]:
    """Run rounds of one block a state, in random order; restart requests that grow too long."""
    samples: dict[str, list[Sample]] = {state: [] for state in STATES}
    rng = random.Random(batch)
    names: list[str] = []
    said: dict[str, dict[str, int]] = {}
    room = 0
    for _ in range(args.rounds):
        needed = len(STATES) * args.steps + 1
        if room < needed:
            if names:
                said = bench.stop(names)
            names, room = bench.start(batch, args.tokens), MAX_LENGTH - args.tokens - 1
            for state in STATES:  # each state's first step allocates
                bench.switch(state)
                bench.step()
            room -= len(STATES)
        room -= len(STATES) * args.steps
        for state in rng.sample(STATES, len(STATES)):
            bench.switch(state)
            SPENT.clear()
            seconds = [bench.step() for _ in range(args.steps)]
            if len(bench.core.scheduler.running) != batch:
                raise SystemExit("requests were preempted: raise VLLM_CPU_KVCACHE_SPACE")
            samples[state].append(
                Sample(seconds, {p: SPENT[p] / 1e3 / args.steps for p in PARTS if p in SPENT})
            )
            tick()
    return samples, bench.stop(names) or said


def bootstrap(values: np.ndarray, statistic: Callable[..., Any], draws: int = 4000) -> list[float]:
    """Return the statistic with its 95 % interval; rows of `values` [rounds, ...] are drawn."""
    rng = np.random.default_rng(0)
    picked = values[rng.integers(len(values), size=(draws, len(values)))]
    low, high = np.percentile(statistic(picked, axis=1), [2.5, 97.5])
    return [float(statistic(values[None], axis=1)[0]), float(low), float(high)]


def _throughput(pairs: np.ndarray, axis: int) -> np.ndarray:
    """Return idle time over own time for [..., rounds, (idle, own)]: tokens/s compared."""
    total = pairs.sum(axis=axis)
    ratio: np.ndarray = total[..., 0] / total[..., 1]
    return ratio


def summarise(
    samples: Mapping[str, list[Sample]], batch: int, said: Mapping[str, Mapping[str, int]]
) -> dict[str, Any]:
    """Return the numbers of one batch size."""
    medians = {s: np.array([np.median(x.step_s) for x in blocks]) for s, blocks in samples.items()}
    totals = {s: np.array([sum(x.step_s) for x in blocks]) for s, blocks in samples.items()}
    out: dict[str, Any] = {}
    for state in STATES:
        step_s = float(np.median([t for x in samples[state] for t in x.step_s]))
        parts = {
            p: float(np.median([x.parts_us.get(p, 0.0) for x in samples[state]]))
            for p in PARTS
            if any(p in x.parts_us for x in samples[state])
        }
        host = float(np.median([sum(x.parts_us.values()) for x in samples[state]]))
        out[state] = {
            "step_ms": step_s * 1e3,
            "tokens_per_s": batch / step_s,
            "step_ratio": bootstrap(medians[state] / medians[IDLE], np.median),
            "throughput_ratio": bootstrap(np.stack([totals[IDLE], totals[state]], 1), _throughput),
            "host_us": host,
            "host_share": host / 1e6 / step_s,
            "parts_us": parts,
        }
        if state in said:
            counts = dict(said[state])
            out[state]["finish_us_per_request"] = counts.pop("finish_ns", 0) / 1e3
            out[state]["verdicts"] = counts
    return out


def reference(root: Path, batches: list[int], size: Size) -> list[dict[str, Any]]:
    """Time what the guard avoids, a full encode, beside what it does, a product of 32 rows."""
    from safetensors import safe_open  # noqa: PLC0415 - used here only

    with safe_open(root / "sae" / "sae_weights.safetensors", framework="pt") as file:
        W, b, theta = (file.get_tensor(n) for n in ("W_enc", "b_enc", "threshold"))
    rows = W[:, list(size.watched)].t().contiguous()
    at = list(size.watched)
    few, few_b, few_theta = rows.t(), b[at], theta[at]

    def encode(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        pre = torch.addmm(b, x, W)
        return pre * (pre > t)

    def median_us(function: Callable[[], Any], repeats: int) -> float:
        times = []
        for _ in range(repeats + 3):
            begin = time.perf_counter_ns()
            function()
            times.append(time.perf_counter_ns() - begin)
        return float(np.median(times[3:])) / 1e3

    out = []
    for batch in batches:
        x = torch.randn(batch, size.hidden)
        out.append(
            {
                "rows": batch,
                "full_us": median_us(functools.partial(encode, x, W, b, theta), 12),
                "watched_us": median_us(functools.partial(encode, x, few, few_b, few_theta), 300),
            }
        )
    return out


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = functools.partial(parser.add_argument, metavar="N")
    add("--batches", default="1,8,32", help="requests in a step, at most 32 (default 1,8,32)")
    add("--rounds", type=int, default=24, help="rounds; each runs every state once (default 24)")
    add("--steps", type=int, default=16, help="decode steps of a state in a round (default 16)")
    add("--tokens", type=int, default=32, help="prompt tokens of a request (default 32)")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--out", type=Path, help="JSON file (default results/overhead-<cpu>.json)")
    parser.add_argument("--docs", type=Path, metavar="ROOT", help="renew the tables of the pages")
    parser.add_argument("--quick", action="store_true", help="a look at all states: two minutes")
    parser.add_argument("--tiny", action="store_true", help="see whether it works; measure nothing")
    args = parser.parse_args()
    if args.quick:
        args.batches, args.rounds, args.steps = "8", 4, 8
    if args.tiny:
        args.batches, args.rounds, args.steps = "2", 2, 2
    args.batches = [int(b) for b in args.batches.split(",")]
    if not all(1 <= b <= 32 for b in args.batches):
        parser.error("--batches: between 1 and 32")
    room = MAX_LENGTH - args.tokens - len(STATES) - 1
    if len(STATES) * args.steps > room:
        parser.error(f"--steps: at most {room // len(STATES)} with --tokens {args.tokens}")
    return args


def main() -> None:
    """Measure, print and write the results."""
    args = parse()
    console = Console(stderr=True)
    size = TINY if args.tiny else FULL
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="saeguard-overhead-") as folder, timed_parts():
        root = Path(folder)
        console.print("making a model and an SAE, starting vLLM: a minute or two")
        bench, about = build(root, size)
        batches: dict[str, Any] = {}
        with Progress(console=console) as progress:
            total = len(args.batches) * args.rounds * len(STATES)
            task = progress.add_task("measuring", total=total)
            for batch in args.batches:
                progress.update(task, description=f"batch {batch}")
                samples, said = measure(
                    bench, batch, args, functools.partial(progress.advance, task)
                )
                batches[str(batch)] = summarise(samples, batch, said)
        idle_op = float(np.mean([b[IDLE]["parts_us"].get("op", 0.0) for b in batches.values()]))
        results = {
            "machine": machine(),
            "versions": {
                "saeguard": version("saeguard"),
                "vllm": sys.modules["vllm"].__version__,
                "torch": torch.__version__,
                "numpy": np.__version__,
            },
            "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
            "revision": revision(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": about,
            "states": MEANING,
            "batches": batches,
            "reference": reference(root, args.batches, size),
            "idle_op_us": idle_op,
        }
        for guards in bench.guards.values():
            if guards.engine is not None:
                guards.engine.close()
    results["seconds"] = round(time.perf_counter() - began)
    slug = re.sub(r"[^a-z0-9]+", "-", results["machine"]["cpu"].lower()).strip("-")
    out = args.out or Path(__file__).parent / "results" / f"overhead-{slug}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=2) + "\n")
    show(results, console)
    console.print(f"{results['seconds']} s; written to {out}")
    if args.markdown:
        print(markdown(results))
    if args.docs is not None:
        document(results, args.docs)


if __name__ == "__main__":
    main()
