"""Patches that both model runners share, and the calls around a forward pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import structlog
import torch

from saeguard.start_report import rank_ready
from saeguard.vllm import contract
from saeguard.vllm.attributes import FORWARD_PASS, WORKER_GUARD, WORKER_UPDATE
from saeguard.vllm.embedded import embedded_positions
from saeguard.vllm.messages import EAGER, SELF_TEST, SERVED
from saeguard.vllm.patches import Original, assumes, patch, reads
from saeguard.vllm.settings import settings_of
from saeguard.vllm.worker import pipeline_parallel
from saeguard.vllm.worker.attach import attach, prepare
from saeguard.vllm.worker.cost import measure_cost
from saeguard.vllm.worker.guard import WorkerGuard
from saeguard.vllm.worker.selftest import Observation

log = structlog.get_logger("saeguard")

RUNNER_V1 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
RUNNER_V1_CPU = "vllm.v1.worker.cpu_model_runner:CPUModelRunner"
RUNNER_V2 = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"

for runner_class in (RUNNER_V1, RUNNER_V2):
    reads(
        runner_class,
        "vllm_config",
        "model_config",
        "scheduler_config",
        "device",
        "model",
        why="attaching taps to the model that was just loaded",
    )
reads("vllm.config:ModelConfig", "dtype", "hf_text_config", why="the self-test's tolerance")
reads(
    "vllm.v1.core.sched.output:SchedulerOutput",
    "scheduled_new_reqs",
    "scheduled_cached_reqs",
    "finished_req_ids",
    "num_scheduled_tokens",
    why="clamp slots, and which role each row of a prompt has",
)
reads(
    "vllm.v1.core.sched.output:NewRequestData",
    "req_id",
    "prompt_token_ids",
    "prompt_embeds",
    "num_computed_tokens",
    why="the prompt length of a request that starts",
)
reads(
    "vllm.v1.core.sched.output:CachedRequestData",
    "req_ids",
    "num_computed_tokens",
    why="which role each row of a prompt has",
)
reads(
    "vllm.v1.outputs:AsyncModelRunnerOutput",
    "get_output",
    why="under asynchronous scheduling the forward pass is handed over with what this returns",
)
assumes(
    "a `SchedulerOutput` takes a further attribute and reaches `execute_model` of every rank with "
    "it, once and in the order of steps",
    why="worker updates travel on it; a rank that misses one raises",
)
assumes(
    "a `ModelRunnerOutput` takes a further attribute and reaches the engine core with it",
    why="the forward pass travels on the output of its own step",
)


@patch(
    f"{RUNNER_V1}.load_model",
    f"{RUNNER_V1_CPU}.load_model",
    f"{RUNNER_V2}.load_model",
    why="forward hooks registered right after loading are traced into the compiled graph",
    differs="takes `model`, too, from 0.32; passed through",
)
def load_model(original: Original, runner: Any) -> Any:
    """Compile the watch list, load the model, and tap it; without the guard, only load it."""
    settings = settings_of(runner.vllm_config)
    if settings is None:
        return original()
    contract.check()
    watchlist = prepare(runner.vllm_config, settings)
    result = original()
    if watchlist.hooks:
        guard = attach(runner.model, runner.vllm_config, watchlist, runner.device)
        WORKER_GUARD.set(runner, guard)
    return result


@patch(
    f"{RUNNER_V1}.sample_tokens",
    f"{RUNNER_V2}.sample_tokens",
    why="its output carries the forward pass to the engine core",
)
def sample_tokens(original: Original, runner: Any) -> Any:
    """Sample tokens, and attach the forward pass to the runner's output."""
    result = original()
    guard = WORKER_GUARD.get(runner)
    return result if guard is None else hand_over(guard, result)


# --- around a forward pass ----------------------------------------------------------------------


def receive(guard: WorkerGuard, scheduler_output: Any, intermediate_tensors: Any) -> None:
    """Apply a step's worker update, and take the readings of earlier pipeline stages."""
    guard.received = pipeline_parallel.take(intermediate_tensors)
    guard.release(scheduler_output.finished_req_ids)
    update = WORKER_UPDATE.get(scheduler_output)
    if update is not None:  # None in the passes that warm a model up
        guard.apply_update(update)
    cached = scheduler_output.scheduled_cached_reqs
    guard.computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    for new in scheduler_output.scheduled_new_reqs:
        guard.computed[new.req_id] = new.num_computed_tokens
        embedded = embedded_positions(new)
        if embedded is not None:
            guard.embedded[new.req_id] = embedded
        tokens = new.prompt_token_ids if new.prompt_token_ids is not None else new.prompt_embeds
        admitted = None if update is None else update.admitted.get(new.req_id)
        guard.announced.setdefault(new.req_id, (len(tokens), admitted))


def begin(
    runner: Any,
    guard: WorkerGuard,
    request_ids: list[str],
    query_start: np.ndarray,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Prepare the taps for a forward pass over real requests; see `WorkerGuard.begin_pass`.

    In the self-test's first request, start to record what the layers consume.
    """
    guard.begin_pass(request_ids, query_start, input_ids, positions)
    if not guard.tested and request_ids[0].startswith(SELF_TEST):
        guard.observation = guard.observation or Observation()
        if request_ids[0] == EAGER:
            depth = int(runner.model_config.hf_text_config.num_hidden_layers)
            guard.observation.start(runner.model, depth, guard.taps)


def end(runner: Any, guard: WorkerGuard) -> None:
    """Start to copy what the taps read; in the self-test, compare it first."""
    if guard.current is None:
        return
    request_id = guard.current.request_ids[0]
    if guard.tested or not request_id.startswith(SELF_TEST):
        guard.end_pass()
        return
    assert guard.observation is not None
    guard.observation.stop()
    rows = int(guard.current.query_start[-1])
    prompt = int(guard.current.positions[0]) == 0  # drafts give later passes several rows, too
    if prompt:
        try:
            if request_id == EAGER:
                guard.observation.choose_halves(guard.taps)
            else:
                guard.observation.compare(guard.taps, rows, runner.model_config.dtype)
        except Exception as error:  # noqa: BLE001 - a rank that raises leaves others waiting for it
            guard.failures.append(str(error))
    guard.end_pass()
    if not prompt and request_id == SERVED and not guard.failures:
        guard.tested, guard.observation = True, None
        _log_ready(runner, guard)


def _log_ready(runner: Any, guard: WorkerGuard) -> None:
    rows = runner.scheduler_config.max_num_seqs
    held, microseconds = measure_cost(guard, rows)
    cost = {
        "layers": [tap.layer for tap in guard.taps],
        "held_mib": round(held, 3),
        "pass_us": round(microseconds, 1),
        "pass_rows": rows,
    }
    log.info(
        "saeguard ready",
        policies=len(guard.watchlist.policies),
        watch_list=guard.watchlist.digest[:12],
        room_for_rows=guard.watchlist.encoder_rows,
        clamps=guard.clamps,
        **cost,
    )
    rank_ready(cost)


def hand_over(guard: WorkerGuard, result: Any) -> Any:
    """Attach the pending forward pass to a runner's output, or to what its `get_output` returns.

    An earlier pipeline stage adds its readings to its intermediate tensors instead.
    """
    if guard.outgoing is not None:
        readings, guard.outgoing = guard.outgoing, None
        return pipeline_parallel.put(result, readings)
    pending = guard.pending
    if pending is None or result is None:
        return result
    if hasattr(result, "get_output"):
        get_output = result.get_output

        def with_forward_pass() -> Any:
            output = get_output()
            FORWARD_PASS.set(output, guard.collect(pending))
            return output

        result.get_output = with_forward_pass
    else:
        FORWARD_PASS.set(result, guard.collect(pending))
    guard.pending = None
    return result
