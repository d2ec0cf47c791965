"""Report the self-test's result of a rank, when the engine core asks for it."""

from __future__ import annotations

from typing import Any

from saeguard.vllm.attributes import WORKER_GUARD
from saeguard.vllm.patches import reads

reads(
    "vllm.v1.worker.gpu_worker:Worker",
    "model_runner",
    why="the guard of a rank hangs on its model runner; the CPU's worker is a subclass",
)


def self_test_failure(worker: Any) -> str | None:
    """Return why the self-test failed on a worker, None if it passed.

    vLLM reports the errors of one rank only, so the engine core runs this on every rank.
    """
    guard = WORKER_GUARD.get(worker.model_runner)
    if guard is None:
        return "the model's process has no guard"
    if guard.tested:
        return None
    return "; ".join(guard.failures) or "the self-test's forward passes did not arrive"
