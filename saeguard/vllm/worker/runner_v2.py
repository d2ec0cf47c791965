"""Patches of Model Runner V2 (`vllm.v1.worker.gpu.model_runner`) around a forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from saeguard.vllm.attributes import WORKER_GUARD
from saeguard.vllm.messages import EAGER
from saeguard.vllm.patches import Original, calls, patch, reads
from saeguard.vllm.worker.hooks import RUNNER_V2, begin, end, hand_over, receive

reads(
    "vllm.v1.worker.gpu.input_batch:InputBatch",
    "num_reqs",
    "req_ids",
    "query_start_loc_np",
    "input_ids",
    "positions",
    why="which row of a forward pass belongs to which request",
)
calls(
    "vllm.v1.worker.gpu.model_runner:dispatch_cg_and_sync_dp",
    named=("need_eager",),
    why="the self-test's first prompt must not replay a captured graph",
    differs="takes more from 0.28 and 0.30, returns other things beside the descriptor from "
    "0.29; passed through",
)


@patch(
    f"{RUNNER_V2}.execute_model",
    why="what the engine core sent with a step is applied before its forward pass",
)
def execute_model(
    original: Original, runner: Any, scheduler_output: Any, intermediate_tensors: Any
) -> Any:
    """Apply the step's worker update, and copy what the taps read; dummy runs pass here too."""
    guard = WORKER_GUARD.get(runner)
    if guard is None:
        return original()
    receive(guard, scheduler_output, intermediate_tensors)
    if not guard.tested and EAGER in scheduler_output.num_scheduled_tokens:
        with _eager():
            result = original()
    else:
        result = original()
    end(runner, guard)
    return hand_over(guard, result)


@contextmanager
def _eager() -> Iterator[None]:
    """Keep the self-test's first pass from replaying a captured graph, which runs no hooks."""
    from vllm.v1.worker.gpu import model_runner

    dispatch = model_runner.dispatch_cg_and_sync_dp

    def eagerly(*args: Any, **kwargs: Any) -> Any:
        return dispatch(*args, **{**kwargs, "need_eager": True})

    model_runner.dispatch_cg_and_sync_dp = eagerly
    try:
        yield
    finally:
        model_runner.dispatch_cg_and_sync_dp = dispatch


@patch(
    f"{RUNNER_V2}.prepare_inputs",
    why="its batch says which row belongs to which request; only real passes go through it",
    differs="takes `batch_req_state`, too, from 0.28, and `num_active_loras` from 0.31; "
    "passed through",
)
def prepare_inputs(original: Original, runner: Any) -> Any:
    """Prepare the batch, and lay out the forward pass for the taps."""
    batch = original()
    guard = WORKER_GUARD.get(runner)
    if guard is not None:
        n = batch.num_reqs
        begin(
            runner,
            guard,
            list(batch.req_ids[:n]),
            batch.query_start_loc_np[: n + 1].copy(),
            batch.input_ids,
            batch.positions,
        )
    return batch
