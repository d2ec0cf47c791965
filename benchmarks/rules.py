"""What the rules cost a forward pass, beside another revision: both measured in turn.

`python -m benchmarks.rules --against ../other-worktree`. Every measurement is a fresh process of
one revision. A pass is timed twice: with the processor's caches as the pass before left them, and
after something else has filled them, as a model does between two steps of an engine. The time is
processor time of one thread, which other work on the machine stretches less than the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

CELLS = (
    (8, 32, 1, 0.0),
    (8, 32, 8, 0.0),
    (8, 32, 32, 0.0),
    (8, 32, 32, 0.02),
    (1000, 10_000, 1, 0.002),
    (1000, 10_000, 32, 0.0),
    (1000, 10_000, 32, 0.002),
    (10_000, 100_000, 1, 0.0002),
)
"""Policies, watched latents, requests, and the share of the latents that fire on a token."""
FILL = 2**23
"""Numbers that fill the caches: 64 MiB."""
PASSES = 16


def cell_us(policies: int, latents: int, batch: int, firing: float, repeats: int) -> dict[str, Any]:
    """Return the median microseconds of a pass, with warm and with cold caches."""
    from benchmarks.match import packets, policies_of, watchlist_of  # noqa: PLC0415 - of any tree
    from saeguard.guard.ledger import Ledger  # noqa: PLC0415

    begin = time.thread_time()
    ledger = Ledger(watchlist_of(policies_of(policies, rich=True), latents), slots=batch)
    for i in range(batch):
        ledger.admit(str(i), 8)
    valid, first, filler = np.ones(batch, np.int64), 0, np.zeros(FILL)
    start_s = time.thread_time() - begin
    times: dict[str, list[float]] = {"warm": [], "cold": []}
    for round_ in range(repeats + 1):
        for now in packets(batch, latents, firing, first):
            kind = "warm" if round_ % 2 else "cold"
            if kind == "cold":
                filler += 1
            begin = time.thread_time()
            ledger.ingest(now, valid, ())
            if round_:  # the first compiles, allocates and sees each request's first tokens
                times[kind].append(time.thread_time() - begin)
        first += PASSES
    begin = time.thread_time()
    ledger.finish("0", first)
    finish_s = time.thread_time() - begin
    return {
        **{kind: 1e6 * float(np.median(t)) for kind, t in times.items()},
        "start_ms": 1e3 * start_s,
        "finish": 1e6 * finish_s,
    }


def revision_of(tree: Path) -> str:
    """Return the commit that a worktree has checked out."""
    command = ["git", "-C", str(tree), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def main() -> None:
    """Measure both revisions in turn, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=Path, help="another worktree of this repository")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each revision")
    parser.add_argument("--repeats", type=int, default=6, help="times 16 passes in each process")
    parser.add_argument("--quick", action="store_true", help="one round, the smaller cells")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    cells = CELLS[:4] if args.quick else CELLS
    if args.measure:
        print(json.dumps([cell_us(*cell, args.repeats) for cell in cells]))
        return
    here = Path(__file__).resolve().parent.parent
    trees = {"this": here, **({"other": args.against.resolve()} if args.against else {})}
    found: dict[str, list[list[dict[str, float]]]] = {name: [] for name in trees}
    for _ in range(1 if args.quick else args.rounds):
        for name, tree in trees.items():
            command = [sys.executable, __file__, "--measure", "--repeats", str(args.repeats)]
            command += ["--quick"] if args.quick else []
            env = {**os.environ, "PYTHONPATH": str(tree)}
            out = subprocess.run(
                command, cwd=tree, env=env, check=True, stdout=subprocess.PIPE, text=True
            )
            found[name].append(json.loads(out.stdout.splitlines()[-1]))
    results = []
    print("policies  latents  batch  firing | µs a pass: warm, cold; finish µs; start ms")
    for i, cell in enumerate(cells):
        median = {
            name: {k: float(np.median([run[i][k] for run in runs])) for k in runs[0][i]}
            for name, runs in found.items()
        }
        results.append({"cell": cell, **median})
        columns = " | ".join(
            f"{m['warm']:9,.1f} {m['cold']:9,.1f} {m['finish']:9,.0f} {m['start_ms']:8,.0f}"
            for m in median.values()
        )
        print(f"{cell[0]:8,} {cell[1]:8,} {cell[2]:6} {100 * cell[3]:6g}% | {columns}")
    if args.out:
        revisions = {name: revision_of(tree) for name, tree in trees.items()}
        about = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "revisions": revisions}
        args.out.write_text(json.dumps({**about, "cells": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
