"""Patches of one engine step: send the worker update, judge the forward pass, stop requests."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from saeguard.guard.forward_pass import ForwardPass
from saeguard.vllm.attributes import ENGINE_GUARD, FORWARD_PASS, WORKER_UPDATE
from saeguard.vllm.engine_core.response import attach_response
from saeguard.vllm.engine_core.stream_flags import fresh_flags
from saeguard.vllm.messages import STOP_REASON
from saeguard.vllm.patches import Original, patch, reads

if TYPE_CHECKING:
    from saeguard.vllm.engine_core.guard import EngineGuard

SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"

reads(
    "vllm.v1.core.sched.output:SchedulerOutput",
    "scheduled_new_reqs",
    "scheduled_cached_reqs",
    "finished_req_ids",
    "num_scheduled_tokens",
    "total_num_scheduled_tokens",
    "scheduled_spec_decode_tokens",
    why="which requests enter and end, rejected drafts, steps without a forward pass",
)
reads("vllm.v1.core.sched.output:NewRequestData", "req_id", why="which requests enter")
reads("vllm.v1.core.sched.output:CachedRequestData", "resumed_req_ids", why="which requests enter")
reads(
    "vllm.v1.outputs:ModelRunnerOutput",
    "req_ids",
    "req_id_to_index",
    "sampled_token_ids",
    why="which drafts were accepted; a stand-in token for requests that must stop",
)
reads(
    "vllm.v1.request:Request",
    "num_tokens",
    "status",
    "stop_reason",
    why="which rows count, and ending a request",
    either=(("num_stale_output_tokens", "drop_stale_output"), ("async_tokens_to_discard",)),
    differs="0.26 discards a stale output while `async_tokens_to_discard` is above 0",
)
reads("vllm.v1.request:RequestStatus.FINISHED_STOPPED", why="ending a request")
reads("vllm.v1.engine:EngineCoreOutputs", "outputs", why="the outputs of a step, by client")
reads(
    "vllm.v1.engine:EngineCoreOutput",
    "request_id",
    "finish_reason",
    why="which outputs are their request's last",
)
reads(
    "vllm.sampling_params:SamplingParams",
    "stop",
    why="stop strings, by which the API server can end a request on its own",
)


@patch(f"{SCHEDULER}.schedule", why="worker updates travel with the step that they hold for")
def schedule(original: Original, scheduler: Any) -> Any:
    """Schedule a step, and attach the worker update to it."""
    scheduled = original()
    guard = ENGINE_GUARD.get(scheduler)
    if guard is not None:
        new_requests = (new.req_id for new in scheduled.scheduled_new_reqs)
        WORKER_UPDATE.set(scheduled, guard.worker_update(new_requests))
    return scheduled


@patch(f"{SCHEDULER}.update_from_output", why="judging the rows that a step left of each request")
def update_from_output(
    original: Original, scheduler: Any, scheduler_output: Any, model_runner_output: Any
) -> Any:
    """Judge a step's forward pass, let vLLM update its requests, and attach verdicts to outputs."""
    guard = ENGINE_GUARD.get(scheduler)
    if guard is None:
        return original()
    began = time.perf_counter()
    forward_pass = FORWARD_PASS.get(model_runner_output)
    if forward_pass is not None:
        guard.passes.push(
            forward_pass,
            valid_rows(guard, forward_pass, scheduler_output, model_runner_output),
            _entering(scheduler_output),
            drafted=scheduler_output.scheduled_spec_decode_tokens,
        )
    elif scheduler_output.total_num_scheduled_tokens and guard.watchlist.hooks:
        guard.passes.lose(scheduler_output.num_scheduled_tokens)
    _stand_in(guard.passes.stopping, model_runner_output)
    before = time.perf_counter() - began
    outputs = original()  # stops requests through `update_request`
    began = time.perf_counter()
    if forward_pass is not None:
        guard.passes.roll_back(forward_pass)
    guard.release(scheduler_output.finished_req_ids)
    _answer(guard, outputs)
    guard.telemetry.counts.observe("step_seconds", before + time.perf_counter() - began)
    return outputs


def _entering(scheduler_output: Any) -> frozenset[str]:
    """Return the requests that start or resume in a step."""
    new = (new.req_id for new in scheduler_output.scheduled_new_reqs)
    return frozenset({*new, *scheduler_output.scheduled_cached_reqs.resumed_req_ids})


def valid_rows(
    guard: EngineGuard, forward_pass: ForwardPass, scheduled: Any, output: Any
) -> np.ndarray:
    """Return how many of each request's leading rows count, [requests].

    A request's rows begin with its known tokens, which count. After them come drafts, of which the
    accepted ones count. Under asynchronous scheduling there can be one more row: of a token whose
    sampling a preemption took back. It does not count.
    """
    valid = np.diff(forward_pass.query_start)
    drafts = scheduled.scheduled_spec_decode_tokens
    for i, request_id in enumerate(forward_pass.request_ids):
        request = guard.requests.get(request_id) or guard.departed.get(request_id)
        if request is None:
            valid[i] = 0
            continue
        first = int(forward_pass.positions[forward_pass.query_start[i]])
        accepted = 0
        if drafts and request_id in drafts and not _stale(request):
            sampled = output.sampled_token_ids[output.req_id_to_index[request_id]]
            accepted = max(0, len(sampled) - 1)
        valid[i] = np.clip(request.num_tokens + accepted - first, 0, valid[i])
    return valid


def _stale(request: Any) -> bool:
    """Return whether vLLM drops a request's output of this step, because it was preempted."""
    if hasattr(request, "async_tokens_to_discard"):  # 0.26
        return bool(request.async_tokens_to_discard > 0)
    return bool(request.num_stale_output_tokens > 0 and request.drop_stale_output)


def _stand_in(stopping: Iterable[str], output: Any) -> None:
    """Give each request that must stop a placeholder token, so that the scheduler updates it.

    A prompt can match in any of its chunks, and only the last chunk samples a token.
    `update_request` drops the placeholder.
    """
    for request_id in stopping:
        if not output.sampled_token_ids:
            output.sampled_token_ids = [[] for _ in output.req_ids]
        i = output.req_id_to_index.get(request_id)
        if i is not None and len(output.sampled_token_ids[i]) == 0:
            output.sampled_token_ids[i] = [0]


@patch(
    f"{SCHEDULER}._update_request_with_output",
    why="`action: stop` ends a request through vLLM's own update of it, before its output is made",
    differs="takes `is_stale`, too, from 0.27; passed through",
)
def update_request(
    original: Original, scheduler: Any, request: Any, new_token_ids: list[int]
) -> Any:
    """Update a request; if it must stop, end it right after the token that fired."""
    guard = ENGINE_GUARD.get(scheduler)
    stop = None if guard is None else guard.passes.stopping.pop(request.request_id, None)
    if stop is None:
        return original()
    from vllm.v1.request import RequestStatus

    kept, _ = original(new_token_ids=new_token_ids[: max(0, stop.tokens - request.num_tokens)])
    # Also if vLLM ended it at the same token: the answer was stopped, and clients must see that.
    request.status = RequestStatus.FINISHED_STOPPED
    request.stop_reason = f"{STOP_REASON}{stop.policy}" + (":error" if stop.error else "")
    return kept, True


def _answer(guard: EngineGuard, outputs: Mapping[Any, Any]) -> None:
    """Attach a request's verdicts, and changes of the running totals, to its last output.

    A request with stop strings gets its verdicts so far with every output, because the API server
    may end it. A stream that asks for flags gets them when a policy acts.
    """
    for client in outputs.values():
        for output in client.outputs:
            response = None
            if output.finish_reason is not None:
                response = guard.finish(output.request_id, str(output.finish_reason))
            elif (request := guard.requests.get(output.request_id)) is not None:
                response = fresh_flags(guard, request)
                if response is None and _stops_outside(request):
                    response = guard.response_so_far(output.request_id)
            if response is not None:
                attach_response(output, response, guard.changed_totals())


def _stops_outside(request: Any) -> bool:
    """Return whether a request has stop strings, by which the API server can end it."""
    params = getattr(request, "sampling_params", None)
    return bool(params is not None and params.stop)
