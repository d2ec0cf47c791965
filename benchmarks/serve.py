"""What a client sees of a guarded server: vLLM's own benchmark client against real servers.

`python -m benchmarks.serve` (`make bench-serve`); `--quick` for a shorter look, `--tiny` to see
whether it works. One server for each state runs throughout, and the client of `vllm bench serve`
asks one after the other, in random order within each round. Only ratios within a round are
compared. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console

from benchmarks.cost_report import METRICS, plot_serve
from benchmarks.overhead import bootstrap
from benchmarks.overhead_model import Size, make_policies, make_sae
from benchmarks.overhead_report import machine, revision
from benchmarks.peers import vllm_version
from tests.engine import engines

UNGUARDED = "unguarded"
STATES = {
    UNGUARDED: "vLLM alone; the plugin is installed and not configured",
    "idle": "guarded; policies are loaded, and apply to no request",
    "armed": "8 policies on 32 latents apply, none fires",
    "firing": "the same policies, firing on most tokens",
}
PAIRS = 5
"""Fewest rounds whose ratios say anything."""


class Server:
    """One server in processes of its own."""

    def __init__(self, state: str, root: Path, model: Path) -> None:
        """Start it; `wait` returns once it answers."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.log, self.events = root / f"{state}.log", root / f"{state}.jsonl"
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
            "--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "bench",
            "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "32",
            "--enforce-eager", "--disable-log-stats", "--no-enable-log-requests",
        ]  # fmt: skip
        if state != UNGUARDED:
            settings = json.loads((root / f"{state}.settings.json").read_text())
            command += ["--additional-config", json.dumps({"saeguard": settings})]
        environment = {
            **engines.environment(),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
        }
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                command, env=environment, stdout=out, stderr=out, start_new_session=True
            )

    def wait(self, seconds: float = 600) -> None:
        """Wait until it answers."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{self.port}/health").is_success:
                    return
            time.sleep(0.5)
        raise SystemExit(f"the server did not start:\n{self.log.read_text()[-4000:]}")

    def judged(self) -> dict[str, int]:
        """Return the verdicts of the requests that it judged, by outcome; `requests`, too."""
        counts: dict[str, int] = {}
        lines = self.events.read_text().splitlines() if self.events.exists() else []
        for event in map(json.loads, lines):
            if event["event"] == "request":
                counts["requests"] = counts.get("requests", 0) + 1
                for outcome, n in event["verdicts"].items():
                    counts[outcome] = counts.get(outcome, 0) + n
        return counts

    def close(self) -> None:
        """End it, its events written."""
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            self.process.terminate()
            self.process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def prepare(root: Path, model: Path, *, latents: int) -> None:
    """Write an SAE for the model, and the policies and settings of each guarded state."""
    config = json.loads((model / "config.json").read_text())
    size = Size(config["hidden_size"], config["num_hidden_layers"], latents)
    sae = make_sae(root / "sae", size)
    for state in STATES:
        if state == UNGUARDED:
            continue
        kind = "firing" if state == "firing" else "armed"
        settings = make_policies(root / state, kind, sae, size).model_dump(exclude_none=True)
        settings["events"] = str(root / f"{state}.jsonl")
        if state == "idle":
            access = root / "access.yaml"
            access.write_text(NOBODY)
            settings["access"] = str(access)
        (root / f"{state}.settings.json").write_text(json.dumps(settings))


NOBODY = """\
schema: saeguard.access/v1
tenants:
  nobody: {keys_sha256: ["0000000000000000000000000000000000000000000000000000000000000000"]}
rules:
  - {policies: ["*"], tenants: [nobody], how: only}
"""
"""An access file under which no policy applies to a request without a key."""


def ask(server: Server, model: Path, args: argparse.Namespace, seed: int) -> dict[str, float]:
    """Run vLLM's benchmark client once; return its figures.

    Raises:
        SystemExit: a request failed, so the figures are of fewer.
    """
    from vllm.benchmarks import serve as client  # noqa: PLC0415 - after the environment is set
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: PLC0415

    parser = FlexibleArgumentParser()
    client.add_cli_args(parser)
    words = [
        "--backend", "openai", "--base-url", f"http://127.0.0.1:{server.port}",
        "--model", "bench", "--tokenizer", str(model), "--dataset-name", "random",
        "--random-input-len", str(args.tokens), "--random-output-len", str(args.steps),
        "--num-prompts", str(args.requests), "--max-concurrency", str(args.concurrency),
        "--seed", str(seed), "--ignore-eos", "--disable-tqdm", "--temperature", "0",
        "--percentile-metrics", "ttft,itl", "--metric-percentiles", "50,99",
    ]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        result = client.main(parser.parse_args(words))
    if result["completed"] != args.requests:
        raise SystemExit(f"{result['completed']} of {args.requests} requests were answered")
    return {name: float(result[name]) for name in METRICS}


def measure(servers: Mapping[str, Server], model: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Return each state's figures, and their ratios to the unguarded server's, with intervals."""
    rng, found = random.Random(0), {state: list[dict[str, float]]() for state in servers}
    for number in range(args.rounds + 1):
        for state in rng.sample(list(servers), len(servers)):
            figures = ask(servers[state], model, args, number)
            if number:  # the first round warms up
                found[state].append(figures)
    plain = found[UNGUARDED]

    def ratio(state: str, metric: str) -> list[float]:
        pairs = zip(found[state], plain, strict=True)
        return bootstrap(
            np.array([mine[metric] / other[metric] for mine, other in pairs]), np.median
        )

    return {
        state: {
            "median": {m: float(np.median([f[m] for f in figures])) for m in METRICS},
            "ratio": {m: ratio(state, m) for m in METRICS},
        }
        for state, figures in found.items()
    }


def check(judged: Mapping[str, Mapping[str, int]], requests: int) -> None:
    """Check that each server was in the state that its figures stand for.

    Raises:
        SystemExit: a guard judged other requests than it was asked, or matched otherwise.
    """
    for state, counts in judged.items():
        matched = bool(counts.get("match"))
        applies = state != "idle"
        right = (
            counts.get("requests") == requests
            and matched == (state == "firing")
            and bool(counts.get("no_match") or matched) == applies
            and not counts.get("error")
        )
        if not right:
            raise SystemExit(f"{state}: expected {requests} requests in that state, got {counts}")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = Path("models/SmolLM2-135M-Instruct")
    parser.add_argument("--model", type=Path, default=default, help=f"default {default}")
    parser.add_argument("--rounds", type=int, default=12, metavar="N", help="default 12")
    parser.add_argument("--requests", type=int, default=48, metavar="N", help="a round: default 48")
    parser.add_argument("--concurrency", type=int, default=8, metavar="N", help="default 8")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="prompt tokens")
    parser.add_argument("--steps", type=int, default=32, metavar="N", help="output tokens")
    parser.add_argument("--latents", type=int, default=16_384, metavar="N", help="of the SAE")
    parser.add_argument("--quick", action="store_true", help="fewer requests, two states")
    parser.add_argument("--tiny", action="store_true", help="see whether it works")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serve.json"))
    parser.add_argument("--plot", type=Path, metavar="SVG", help="draw the ratios")
    args = parser.parse_args()
    args.states = list(STATES)
    if args.quick:
        args.rounds, args.requests, args.steps = PAIRS, 8, 16
        args.states = [UNGUARDED, "firing"]
    if args.tiny:
        args.rounds, args.requests, args.steps, args.latents = 1, 3, 4, 256
        args.states = [UNGUARDED, "firing"]
    elif args.rounds < PAIRS:
        parser.error(f"--rounds: expected at least {PAIRS}, got {args.rounds}")
    return args


def main() -> None:
    """Measure, print and write the results."""
    args, console = parse(), Console(stderr=True)
    began = time.perf_counter()
    servers: dict[str, Server] = {}
    with tempfile.TemporaryDirectory(prefix="saeguard-serve-") as name:
        root, model = Path(name), args.model
        if args.tiny:
            from tests import models  # noqa: PLC0415 - used here only

            model = models.make_guarded(root / "tiny").model
        prepare(root, model, latents=args.latents)
        try:
            for state in args.states:
                console.print(f"starting {state}: {STATES[state]}")
                servers[state] = Server(state, root, model)
                servers[state].wait()
            found = measure(servers, model, args)
        finally:
            for server in servers.values():
                server.close()
        judged = {s: server.judged() for s, server in servers.items() if s != UNGUARDED}
    check(judged, (args.rounds + 1) * args.requests)
    results = {
        "machine": machine(),
        "versions": {n: version(n) for n in ("saeguard", "torch", "numpy")}
        | {"vllm": vllm_version()},
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "revision": revision(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": args.model.name if not args.tiny else "tiny",
        "states": {state: STATES[state] for state in args.states},
        "servers": found,
        "judged": judged,
        "seconds": round(time.perf_counter() - began),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=2) + "\n")
    for state, figures in found.items():
        shown = ", ".join(
            f"{title} {figures['median'][m]:.4g} ({r[0]:.3f} [{r[1]:.3f}, {r[2]:.3f}])"
            for m, title in METRICS.items()
            for r in [figures["ratio"][m]]
        )
        console.print(f"{state}: {shown}", highlight=False)
    console.print(f"{results['seconds']} s; written to {args.out}")
    if args.plot is not None:
        plot_serve(results, args.plot)


if __name__ == "__main__":
    main()
