"""What both model runners share: requests announced, passes tested, packets delivered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import structlog
import torch

from saeguard.vllm import contract
from saeguard.vllm.selftest import EAGER, PREFIX, SERVED, Observation
from saeguard.vllm.settings import settings_of
from saeguard.vllm.worker import guard as worker_guard
from saeguard.vllm.worker import pipeline_parallel
from saeguard.vllm.worker.guard import WorkerGuard

log = structlog.get_logger("saeguard")

ATTRIBUTE = "saeguard"
"""Where a runner keeps its `WorkerGuard`, and an output its `Packet`."""


def guard_of(runner: Any) -> WorkerGuard | None:
    """Return the runner's guard, None where the server is not configured for one."""
    return getattr(runner, ATTRIBUTE, None)


def load_model(wrapped: Callable[..., Any], runner: Any, args: Any, kwargs: Any) -> Any:
    """Around `load_model`: watch list before, taps after, nothing without configuration."""
    settings = settings_of(runner.vllm_config)
    if settings is None:
        return wrapped(*args, **kwargs)
    contract.check()
    watchlist = worker_guard.prepare(runner.vllm_config, settings)
    result = wrapped(*args, **kwargs)
    if watchlist.hooks:
        guard = worker_guard.attach(runner.model, runner.vllm_config, watchlist, runner.device)
        setattr(runner, ATTRIBUTE, guard)
    return result


def announce(guard: WorkerGuard, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Take in the arguments of `execute_model`, and return its `SchedulerOutput`.

    What finished requests held is taken back, what the engine core tells is done, and what earlier
    pipeline stages read is received.
    """
    scheduler_output = args[0] if args else kwargs["scheduler_output"]
    intermediate = args[1] if len(args) > 1 else kwargs.get("intermediate_tensors")
    guard.received = pipeline_parallel.take(intermediate)
    guard.release(scheduler_output.finished_req_ids)
    update = getattr(scheduler_output, ATTRIBUTE, None)
    if update is not None:  # None with the passes that warm a model up
        guard.carry_out(update)
    cached = scheduler_output.scheduled_cached_reqs
    guard.computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    for new in scheduler_output.scheduled_new_reqs:
        guard.computed[new.req_id] = new.num_computed_tokens
        tokens = new.prompt_token_ids if new.prompt_token_ids is not None else new.prompt_embeds
        admitted = None if update is None else update.admitted.get(new.req_id)
        guard.announced.setdefault(new.req_id, (len(tokens), admitted))
    return scheduler_output


def begin(
    runner: Any,
    guard: WorkerGuard,
    request_ids: list[str],
    query_start: np.ndarray,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Prepare the taps for a pass over real requests."""
    guard.before(request_ids, query_start, input_ids, positions)
    if not guard.tested and request_ids[0].startswith(PREFIX):
        guard.observation = guard.observation or Observation()
        if request_ids[0] == EAGER:
            depth = int(runner.model_config.hf_text_config.num_hidden_layers)
            guard.observation.watch(runner.model, depth, guard.taps)


def end(runner: Any, guard: WorkerGuard) -> None:
    """Start copying what the pass saw; during the self-test, compare it first."""
    if guard.opened is None:
        return
    request_ids, query_start, positions = guard.opened
    testing = not guard.tested and request_ids[0].startswith(PREFIX)
    prompt = testing and int(positions[0]) == 0  # a later pass can have several rows: drafts
    if testing:
        guard.observation.stop()
    if prompt:
        try:
            _test(runner, guard, request_ids[0], int(query_start[-1]))
        except Exception as error:  # noqa: BLE001 - a rank that raises leaves others waiting for it
            guard.failures.append(str(error))
    guard.after()
    if testing and not prompt and request_ids[0] == SERVED and not guard.failures:
        guard.tested, guard.observation = True, None
        _report(runner, guard)


def _test(runner: Any, guard: WorkerGuard, request_id: str, rows: int) -> None:
    """Learn from or compare one prompt pass of the self-test.

    Raises:
        SelfTestError: the taps do not see what they must.
    """
    if request_id == EAGER:
        guard.observation.settle(guard.taps)
    else:
        guard.observation.compare(guard.taps, rows, runner.model_config.dtype)


def tested(worker: Any) -> str | None:
    """Return what is wrong on a worker after the self-test, None where nothing is.

    The engine core asks this of every rank: vLLM listens to the errors of one rank only.
    """
    guard = guard_of(worker.model_runner)
    if guard is None:
        return "there is no guard in the model's process"
    if not guard.tested:
        return "; ".join(guard.failures) or "the test's passes did not come by"
    return None


def _report(runner: Any, guard: WorkerGuard) -> None:
    rows = runner.scheduler_config.max_num_seqs
    held, microseconds = worker_guard.cost(guard, rows)
    log.info(
        "saeguard ready",
        policies=len(guard.watchlist.policies),
        watch_list=guard.watchlist.digest[:12],
        layers=[tap.layer for tap in guard.taps],
        room_for_rows=guard.watchlist.columns,
        clamps=guard.clamps,
        held_mib=round(held, 3),
        pass_us=round(microseconds, 1),
        pass_rows=rows,
    )


def deliver(guard: WorkerGuard, result: Any) -> Any:
    """Attach the pending packet to a runner's output, now or when its copies have arrived.

    A pipeline stage that is not the last hands its readings on with its intermediate tensors.
    """
    if guard.outgoing is not None:
        readings, guard.outgoing = guard.outgoing, None
        return pipeline_parallel.put(result, readings)
    pending = guard.pending
    if pending is None or result is None:
        return result
    if hasattr(result, "get_output"):
        get_output = result.get_output

        def with_packet() -> Any:
            output = get_output()
            setattr(output, ATTRIBUTE, guard.collect(pending))
            return output

        result.get_output = with_packet
    else:
        setattr(result, ATTRIBUTE, guard.collect(pending))
    guard.pending = None
    return result


def sample_tokens(wrapped: Callable[..., Any], runner: Any, args: Any, kwargs: Any) -> Any:
    """Around `sample_tokens`: its output carries the packet to the engine core."""
    result = wrapped(*args, **kwargs)
    guard = guard_of(runner)
    return result if guard is None else deliver(guard, result)
