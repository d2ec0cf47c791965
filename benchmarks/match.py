"""What matching costs a step: policies x watched latents x batch, beside a step of a model.

One process. A decode step of the benchmark model (random Qwen3 of 222M parameters, Transformers,
float32) runs between any two measurements, so that the rules are come back to cold, as in an
engine. Both are the processor time of one thread, which other work on the machine stretches less
than the clock. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from saeguard.guard.compiled_rules import compile_rules
from saeguard.guard.forward_pass import ForwardPass
from saeguard.guard.ledger import Ledger
from saeguard.guard.watchlist import WatchList
from saeguard.policy.condition import parse
from saeguard.policy.phrases import over, window
from saeguard.policy.types import Over, Policy, Scope, Selection

VOCABULARY, CONTEXT, PASSES = 2048, 64, 16
CONDITIONS = ("a and b and c", "a or b or c", "2 of (a, b, c)", "a and not (b or c)")
POINTS = "4 points of (3 for a, 2 for b, 2 for c)"
WINDOWS = ("1 of 1 tokens", "1 of 1 tokens", "3 of 8 tokens", "2 of 4 tokens")
OVERS = ("mean of 16 tokens", "max of 16 tokens", "average with half-life 8 tokens")
COUNT = "20 tokens in the request"


def policies_of(count: int, *, rich: bool) -> list[Policy]:
    """Return policies of three selections; `rich`: a quarter of them look at several tokens."""
    rng = random.Random(0)
    scopes: list[Scope] = ["both", "output", "prompt"]
    found = []
    for i in range(count):
        several = rich and i % 4 == 3
        found.append(
            Policy(
                id=f"p{i}",
                title="",
                owner="",
                severity="low",
                mode="enforce",
                action="flag",
                on_error="allow",
                scope=scopes[i % 3],
                uncached="count",
                feature_set="bench",
                rationale="",
                falsepositives=(),
                review_by=date(2030, 1, 1),
                detect={
                    name: Selection(
                        f"f{3 * i + j}",
                        rng.uniform(0.3, 1.0),
                        over(rng.choice(OVERS)) if several else Over(),
                    )
                    for j, name in enumerate("abc")
                },
                condition=parse(POINTS if several else CONDITIONS[i % 4]).expr,
                window=window(COUNT if rich and i % 16 == 5 else WINDOWS[i // 4 % 4]),
                keep=0,
                clamp=None,
                exceptions=(),
                path=Path(f"p{i}.yaml"),
                digest="0" * 64,
            )
        )
    return found


def watchlist_of(policies: Sequence[Policy], latents: int) -> WatchList:
    """Return a watch list in which the latents are dealt out to the policies' features."""
    features = 3 * len(policies)
    deal = np.arange(max(latents, features)) % latents
    rounds = [deal[i : i + features] for i in range(0, len(deal), features)]
    names = tuple(f"bench/f{i}" for i in range(features))
    return WatchList(
        policies=tuple(policies),
        hooks=(),
        clamps=(),
        features=names,
        mix=tuple((column, np.ones(len(column), np.float32)) for column in rounds),
        low=np.zeros(features, np.float32),
        span=np.ones(features, np.float32),
        rules=compile_rules(policies, {name: i for i, name in enumerate(names)}),
        exclude_tokens=(),
        models=(),
        digest="0" * 64,
    )


def packets(batch: int, latents: int, firing: float, first: int) -> list[ForwardPass]:
    """Return passes in which each of `batch` requests brings one token."""
    rng = np.random.default_rng(0)
    fired = rng.random((PASSES, batch, latents)) < firing
    f = np.where(fired, rng.random(fired.shape) * 1.5, 0).astype(np.float32)
    return [
        ForwardPass(
            request_ids=[str(i) for i in range(batch)],
            query_start=np.arange(batch + 1),
            positions=np.full(batch, first + t),
            eligible=np.ones(batch, bool),
            f=f[t],
            acted=None,
            ran=True,
            watchlist="0" * 64,
        )
        for t in range(PASSES)
    ]


def decoder(batch: int, *, tiny: bool = False) -> Callable[[], object]:
    """Return a decode step of the benchmark model, `batch` requests behind `CONTEXT` tokens."""
    import transformers  # noqa: PLC0415 - slow to import

    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=1 if tiny else 14,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    cache = transformers.DynamicCache(config=config)
    tokens = torch.randint(3, VOCABULARY, (batch, CONTEXT))
    with torch.inference_mode():
        model(tokens, past_key_values=cache)

    @torch.inference_mode()
    def step() -> object:
        out = model(tokens[:, :1], past_key_values=cache)
        cache.crop(CONTEXT)
        return out

    return step


def measure(
    step: Callable[[], object], batch: int, count: int, latents: int, firing: float, args: Any
) -> dict[str, Any]:
    """Time a step, and the rules after each step."""
    watchlist = watchlist_of(policies_of(count, rich=not args.plain), latents)
    steps, rules = [], []
    ledger = Ledger(watchlist, slots=batch)
    for i in range(batch):
        ledger.admit(str(i), 8)
    first, valid = 0, np.ones(batch, np.int64)
    for round_ in range(args.rounds + 1):
        for now in packets(batch, latents, firing, first)[: args.steps]:
            steps.append(timed(step))
            rules.append(timed(lambda now=now: ledger.ingest(now, valid, ())))
        first += args.steps
        if round_ == 0:  # the first one compiles, allocates and sees every request's first tokens
            steps, rules = [], []
    finish = timed(lambda: [ledger.finish(str(i), first) for i in range(batch)]) / batch
    step_s, rules_s = float(np.median(steps)), float(np.median(rules))
    return {
        "policies": count,
        "latents": latents,
        "batch": batch,
        "firing": firing,
        "step_ms": step_s * 1e3,
        "rules_us": rules_s * 1e6,
        "share": rules_s / step_s,
        "finish_us": finish * 1e6,
    }


def cpu() -> str:
    """Return what the processor calls itself."""
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


def timed(function: Callable[[], object]) -> float:
    """Return the processor seconds that a call takes of this thread."""
    begin = time.thread_time()
    function()
    return time.thread_time() - begin


def rows_of(cells: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    """Return the table's rows."""
    for c in cells:
        yield [
            f"{c['policies']:,}",
            f"{c['latents']:,}",
            str(c["batch"]),
            f"{100 * c['firing']:g} %",
            f"{c['step_ms']:.0f} ms",
            f"{c['rules_us']:,.0f} µs ({100 * c['share']:.2f} %)",
            f"{c['finish_us']:,.0f} µs",
        ]


HEAD = ["policies", "latents", "batch", "firing", "step", "each pass", "finish"]


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policies", default="10,100,1000", metavar="N,...")
    parser.add_argument("--latents", default="100,1000,10000", metavar="N,...")
    parser.add_argument("--batches", default="1,8,32", metavar="N,...")
    parser.add_argument("--firing", default="0.02", metavar="SHARE,...", help="latents that fire")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plain", action="store_true", help="no aggregates, counts or points")
    parser.add_argument("--steps", type=int, default=4, help="steps of a round that are timed")
    parser.add_argument("--tiny", action="store_true", help="a model of one layer")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(stderr=True)
    cells = []
    for batch in map(int, args.batches.split(",")):
        step = decoder(batch, tiny=args.tiny)
        for count in map(int, args.policies.split(",")):
            for latents in map(int, args.latents.split(",")):
                for firing in map(float, args.firing.split(",")):
                    cells.append(measure(step, batch, count, latents, firing, args))
                    console.print(*next(rows_of(cells[-1:])), sep=" | ")
    if args.out:
        about = {
            "machine": cpu(),
            "python": platform.python_version(),
            "versions": {name: version(name) for name in ("numpy", "torch", "transformers")},
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "arguments": {k: str(v) for k, v in vars(args).items()},
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({**about, "cells": cells}, indent=2) + "\n")
    if args.markdown:
        rows = [HEAD, ["---:"] * len(HEAD), *rows_of(cells)]
        print("\n".join(f"| {' | '.join(row)} |" for row in rows))
        return
    table = Table(*HEAD)
    for row in rows_of(cells):
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    main()
