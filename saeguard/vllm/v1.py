"""Model Runner V1 (`vllm.v1.worker.gpu_model_runner`): where a pass begins and ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from saeguard.vllm import contract, worker
from saeguard.vllm.config import settings_of
from saeguard.vllm.selftest import PREFIX, SERVED, Observation
from saeguard.vllm.worker import WorkerGuard

ATTRIBUTE = "saeguard"
"""Where a runner keeps its `WorkerGuard`, and an output its `Packet`."""


def load_model(wrapped: Callable[..., Any], runner: Any, args: Any, kwargs: Any) -> Any:
    """Around `load_model`: watch list before, taps after, nothing without configuration."""
    settings = settings_of(runner.vllm_config)
    if settings is None:
        return wrapped(*args, **kwargs)
    contract.check()
    watchlist = worker.prepare(runner.vllm_config, settings)
    result = wrapped(*args, **kwargs)
    if watchlist.hooks:
        guard = worker.attach(runner.model, runner.vllm_config, settings, watchlist, runner.device)
        setattr(runner, ATTRIBUTE, guard)
    return result


def model_forward(wrapped: Callable[..., Any], runner: Any, args: Any, kwargs: Any) -> Any:
    """Around `_model_forward`, which real batches pass through and dummy runs do not."""
    guard: WorkerGuard | None = getattr(runner, ATTRIBUTE, None)
    if guard is None:
        return wrapped(*args, **kwargs)
    batch = runner.input_batch
    n = batch.num_reqs
    request_ids = list(batch.req_ids[:n])
    query_start = runner.query_start_loc.np[: n + 1].copy()
    requests = {
        r: (
            runner.requests[r].num_prompt_tokens,
            worker.enforced_by_request(runner.requests[r].sampling_params),
        )
        for r in (request_ids if guard.clamps else ())
        if r not in guard.slots
    }
    rows = int(query_start[-1])
    guard.before(
        request_ids,
        query_start,
        batch.num_computed_tokens_cpu[:n],
        runner.input_ids.gpu[:rows],
        requests,
    )
    if guard.tested or not request_ids[0].startswith(PREFIX):
        result = wrapped(*args, **kwargs)
    else:
        result = _tested_forward(wrapped, runner, guard, request_ids[0], rows, kwargs)
    guard.after(request_ids, query_start, runner.positions[:rows])
    return result


def _tested_forward(
    wrapped: Callable[..., Any],
    runner: Any,
    guard: WorkerGuard,
    request_id: str,
    rows: int,
    kwargs: Any,
) -> Any:
    """Run one pass of the start-up self-test, and compare what the taps saw."""
    observation = guard.observation = guard.observation or Observation()
    depth = int(runner.model_config.hf_text_config.num_hidden_layers)
    handles = observation.before(request_id, runner.model, depth, guard.taps)
    try:
        result = wrapped(**kwargs)
    finally:
        for handle in handles:
            handle.remove()
    if rows > 1:
        observation.compare(guard, rows, runner.model_config.dtype)
    elif request_id == SERVED:
        guard.tested, guard.observation = True, None
    return result


def execute_model(wrapped: Callable[..., Any], runner: Any, args: Any, kwargs: Any) -> Any:
    """Around `execute_model`: slots come back first; pooling models end here."""
    guard: WorkerGuard | None = getattr(runner, ATTRIBUTE, None)
    if guard is None:
        return wrapped(*args, **kwargs)
    scheduler_output = args[0] if args else kwargs["scheduler_output"]
    guard.release(list(scheduler_output.finished_req_ids))
    result = wrapped(*args, **kwargs)
    return result if result is None else deliver(guard, result)


def sample_tokens(wrapped: Callable[..., Any], runner: Any, args: Any, kwargs: Any) -> Any:
    """Around `sample_tokens`: its output carries the packet to the engine core."""
    result = wrapped(*args, **kwargs)
    guard: WorkerGuard | None = getattr(runner, ATTRIBUTE, None)
    return result if guard is None else deliver(guard, result)


def deliver(guard: WorkerGuard, result: Any) -> Any:
    """Attach the pending packet to a runner's output, now or when its copies have arrived."""
    pending, guard.pending = guard.pending, None
    if pending is None:
        return result
    if hasattr(result, "get_output"):
        get_output = result.get_output

        def with_packet() -> Any:
            output = get_output()
            setattr(output, ATTRIBUTE, guard.collect(pending))
            return output

        result.get_output = with_packet
    elif hasattr(result, "req_ids"):
        setattr(result, ATTRIBUTE, guard.collect(pending))
    else:  # intermediate tensors of a pipeline stage: refused at start-up
        guard.pending = pending
    return result

