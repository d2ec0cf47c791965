"""What the end of a request costs the engine's thread, by the number of policies.

`python -m benchmarks.ending`. The engine core's own `EngineGuard` judges requests of 64 tokens
whose activations are random, and is asked to end them as the scheduler asks: verdicts, counters,
the response's part, and handing the events to their writer. Times are processor time of this
thread, so that other work on the machine shows little in them; the writer's is printed too, and
what a request without a match leaves in the event log, by the setting `event_lines`.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import structlog
import torch
from rich.console import Console

from benchmarks.reload import policy
from saeguard.guard.forward_pass import ForwardPass
from saeguard.vllm.engine_core.guard import EngineGuard
from saeguard.vllm.settings import parse_settings
from saeguard.vllm.startup import start
from tests import models

TOKENS, ENDS = 64, 40
DAY = 1000 * 24 * 3600
"""Requests of a day at 1,000 a second."""


class Ends(NamedTuple):
    """What ends of requests cost, medians of several."""

    end_ms: float
    writer_ms: float
    bytes: int
    """In the event log, for each request."""


def ends(root: Path, policies: int, lines: str) -> Ends:
    """Return what the end of a request without a match costs."""
    folder = root / f"policies{policies}"
    if not folder.exists():
        folder.mkdir()
        for i in range(policies):
            policy(folder, i, 60.0, i % 500)
    settings = {"policies": str(folder), "feature_sets": str(root / "sets"), "watch_capacity": 1024}
    log = root / f"{policies}.{lines}.jsonl"
    checked = parse_settings({**settings, "events": str(log), "event_lines": lines})
    started = start(checked)
    guard = EngineGuard(started, checked, "SmolLM2-135M-Instruct")
    rng, took, wrote = np.random.default_rng(0), [], []
    for n in range(ENDS):
        request = SimpleNamespace(
            request_id=f"chatcmpl-{n:032x}-{n:08x}", num_prompt_tokens=8, num_tokens=TOKENS + 1,
            num_computed_tokens=TOKENS, block_hashes=[], sampling_params=None, lora_request=None,
            stop_reason=None,
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
    size = log.stat().st_size // ENDS
    return Ends(round(statistics.median(took), 3), round(statistics.median(wrote), 2), size)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policies", type=int, nargs="+", default=[8, 100, 1000])
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet = structlog.make_filtering_bound_logger(logging.ERROR)
    structlog.configure(wrapper_class=quiet)  # these policies rest on nothing, which is warned of
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        sae = models.make_sae(root / "sae", layer=1, d_in=64, d_sae=512)
        models.write_feature_set(root / "sets" / "tiny.yaml", sae, latents=tuple(range(512)))
        for policies in options.policies:
            for lines in ("matches", "all"):
                found = ends(root, policies, lines)
                Console().print(
                    f"{policies} policies, event_lines {lines}: {found.end_ms} ms an end, "
                    f"{found.writer_ms} ms of the writer; {found.bytes} bytes a request, "
                    f"{found.bytes * DAY / 1e9:.3g} GB a day at 1,000 a second",
                    soft_wrap=True,
                )


if __name__ == "__main__":
    main()
