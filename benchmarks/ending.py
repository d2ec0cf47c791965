"""What the end of a request costs the engine's thread, by the number of policies.

`python -m benchmarks.ending`. The engine core's own `EngineGuard` judges requests of 64 tokens
whose activations are random, and is asked to end them as the scheduler asks: verdicts, counters,
the response's part, and handing the events to their writer. Times are processor time of this
thread, so that other work on the machine shows little in them; the writer's is told beside it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from rich.console import Console

from benchmarks.reload import policy
from saeguard.guard.forward_pass import ForwardPass
from saeguard.vllm.engine_core.guard import EngineGuard
from saeguard.vllm.settings import parse_settings
from saeguard.vllm.startup import start
from tests import models

TOKENS, ENDS = 64, 40


def ends(root: Path, policies: int) -> tuple[float, float]:
    """Return processor time of one end, and of writing its events, ms, medians of several."""
    folder = root / f"policies{policies}"
    folder.mkdir()
    for i in range(policies):
        policy(folder, i, 60.0, i % 500)
    settings = {"policies": str(folder), "feature_sets": str(root / "sets"), "watch_capacity": 1024}
    checked = parse_settings({**settings, "events": str(root / f"{policies}.jsonl")})
    started = start(checked)
    guard = EngineGuard(started, checked, "model")
    rng, took, wrote = np.random.default_rng(0), [], []
    for n in range(ENDS):
        request = SimpleNamespace(
            request_id=f"r{n}", num_prompt_tokens=8, num_tokens=TOKENS + 1,
            num_computed_tokens=TOKENS, block_hashes=[], sampling_params=None, lora_request=None,
        )  # fmt: skip
        guard.admit(request, None)
        f = rng.normal(size=(TOKENS, started.watchlist.columns)).astype(np.float32).clip(0)
        forward_pass = ForwardPass(
            [request.request_id], np.array([0, TOKENS]), np.arange(TOKENS), np.ones(TOKENS, bool),
            f, None, True, started.watchlist.digest,
        )  # fmt: skip
        guard.versions.ingest(forward_pass, np.array([TOKENS]))
        began = time.thread_time()
        said = guard.finish(request.request_id, "length")
        took.append(1e3 * (time.thread_time() - began))
        assert said is not None
        assert said["policies"] == policies
        sink, before = guard.telemetry.sink, time.process_time()
        assert sink is not None
        while sink.written + sink.dropped < sink.produced:
            time.sleep(0.002)
        wrote.append(1e3 * (time.process_time() - before))
    guard.close()
    return round(statistics.median(took), 3), round(statistics.median(wrote), 2)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policies", type=int, nargs="+", default=[10, 100, 1000])
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        sae = models.make_sae(root / "sae", layer=1, d_in=64, d_sae=512)
        models.write_feature_set(root / "sets" / "tiny.yaml", sae, latents=tuple(range(512)))
        for policies in options.policies:
            end, write = ends(root, policies)
            Console().print(f"{policies} policies: {end} ms an end, {write} ms of the writer")


if __name__ == "__main__":
    main()
