"""Patches of Model Runner V1 (`vllm.v1.worker.gpu_model_runner`) around a forward pass."""

from __future__ import annotations

from typing import Any

from saeguard.vllm.attributes import WORKER_GUARD
from saeguard.vllm.patches import Original, assumes, patch, reads
from saeguard.vllm.worker.hooks import RUNNER_V1, begin, end, hand_over, receive

reads(
    RUNNER_V1,
    "input_batch",
    "query_start_loc",
    "input_ids",
    "positions",
    why="which row of a forward pass belongs to which request",
)
reads(
    "vllm.v1.worker.gpu_input_batch:InputBatch",
    "num_reqs",
    "req_ids",
    why="the requests of a forward pass, in row order",
)
reads("vllm.v1.utils:CpuGpuBuffer", "np", "gpu", why="`query_start_loc` and `input_ids` are such")
assumes(
    "dummy runs do not go through `_model_forward`",
    why="telling real forward passes from those that warm up or capture",
)


@patch(
    f"{RUNNER_V1}.execute_model",
    why="what the engine core sent with a step is applied before its forward pass",
)
def execute_model(
    original: Original, runner: Any, scheduler_output: Any, intermediate_tensors: Any
) -> Any:
    """Apply the step's worker update, run the step, and hand over if there is an output.

    If tokens are sampled, `sample_tokens` hands over instead.
    """
    guard = WORKER_GUARD.get(runner)
    if guard is None:
        return original()
    receive(guard, scheduler_output, intermediate_tensors)
    return hand_over(guard, original())


@patch(f"{RUNNER_V1}._model_forward", why="one forward pass over real requests")
def model_forward(original: Original, runner: Any) -> Any:
    """Lay out the forward pass for the taps, run it, and copy what they read."""
    guard = WORKER_GUARD.get(runner)
    if guard is None:
        return original()
    n = runner.input_batch.num_reqs
    begin(
        runner,
        guard,
        list(runner.input_batch.req_ids[:n]),
        runner.query_start_loc.np[: n + 1].copy(),
        runner.input_ids.gpu,
        runner.positions,
    )
    result = original()
    end(runner, guard)
    return result
