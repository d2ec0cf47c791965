"""The scheduler seam: packets in as a step takes effect, verdicts out with its outputs."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
from collections.abc import Callable
from typing import Any

import structlog

from saeguard.vllm import selftest
from saeguard.vllm.config import load_watchlist, settings_of
from saeguard.vllm.engine import EngineGuard
from saeguard.vllm.runner import ATTRIBUTE

log = structlog.get_logger("saeguard")


def init(wrapped: Callable[..., Any], scheduler: Any, args: Any, kwargs: Any) -> None:
    """Around `Scheduler.__init__`: the rules live beside the requests they judge."""
    wrapped(*args, **kwargs)
    settings = settings_of(scheduler.vllm_config)
    guard = None
    if settings is not None:
        model = scheduler.vllm_config.model_config
        name = model.served_model_name
        guard = EngineGuard(
            load_watchlist(settings),
            settings,
            name[0] if isinstance(name, list) else name or model.model,
        )
    setattr(scheduler, ATTRIBUTE, guard)


def add_request(wrapped: Callable[..., Any], scheduler: Any, args: Any, kwargs: Any) -> Any:
    """Around `Scheduler.add_request`: a request has an account before it has tokens."""
    guard: EngineGuard | None = getattr(scheduler, ATTRIBUTE, None)
    if guard is not None:
        guard.admit(args[0] if args else kwargs["request"])
    return wrapped(*args, **kwargs)


def update_from_output(wrapped: Callable[..., Any], scheduler: Any, args: Any, kwargs: Any) -> Any:
    """Around `Scheduler.update_from_output`: judge what the step left of each request."""
    guard: EngineGuard | None = getattr(scheduler, ATTRIBUTE, None)
    if guard is None:
        return wrapped(*args, **kwargs)
    scheduled, output = (
        args
        if len(args) > 1
        else (
            kwargs["scheduler_output"],
            kwargs["model_runner_output"],
        )
    )
    packet = getattr(output, ATTRIBUTE, None)
    if packet is not None:
        valid = guard.valid_rows(packet, scheduler, scheduled, output)
    elif scheduled.total_num_scheduled_tokens and guard.watchlist.hooks:
        guard.unread_steps += 1
        guard.ledger.unwatched_passes += 1
    outputs = wrapped(*args, **kwargs)
    if packet is not None:
        guard.ingest(packet, valid)
    for client in outputs.values():
        for item in client.outputs:
            said = None
            if item.finish_reason is not None:
                said = guard.finish(item.request_id, str(item.finish_reason))
            elif _stops_outside(guard.requests.get(item.request_id)):
                said = guard.so_far(item.request_id)
            if said is not None:
                item.kv_transfer_params = {**(item.kv_transfer_params or {}), ATTRIBUTE: said}
    return outputs


def _stops_outside(request: Any) -> bool:
    """Return whether the API server can end the request by itself: stop strings."""
    params = getattr(request, "sampling_params", None)
    return bool(params is not None and params.stop)


def finish_requests(wrapped: Callable[..., Any], scheduler: Any, args: Any, kwargs: Any) -> Any:
    """Around `Scheduler.finish_requests`: aborted requests get their verdicts, too."""
    result = wrapped(*args, **kwargs)
    guard: EngineGuard | None = getattr(scheduler, ATTRIBUTE, None)
    if guard is not None and guard.requests:
        for request_id in [r for r in guard.requests if r not in scheduler.requests]:
            guard.finish(request_id, "abort")
    return result


def shutdown(wrapped: Callable[..., Any], scheduler: Any, args: Any, kwargs: Any) -> Any:
    """Around `Scheduler.shutdown`: no event is lost."""
    guard: EngineGuard | None = getattr(scheduler, ATTRIBUTE, None)
    if guard is not None:
        guard.close()
    return wrapped(*args, **kwargs)


def engine_core_init(wrapped: Callable[..., Any], core: Any, args: Any, kwargs: Any) -> None:
    """Around `EngineCore.__init__`: nothing is served before the guard has seen a request."""
    wrapped(*args, **kwargs)
    _test_once(core)


def run_busy_loop(wrapped: Callable[..., Any], core: Any, args: Any, kwargs: Any) -> Any:
    """Around `EngineCoreProc.run_busy_loop`, for a core in a process of its own.

    There plugins are loaded while `EngineCore.__init__` runs already, too late to be around it.
    Requests wait until the loop begins, so none is served before the test. If it fails, the
    process that started this one is told to end, too: an API server that is still starting
    would wait for its dead engine for ever.
    """
    try:
        _test_once(core)
    except Exception:
        parent = multiprocessing.parent_process()
        if parent is not None and parent.pid is not None:
            log.exception("saeguard: the server ends, it would be unguarded")
            os.kill(parent.pid, signal.SIGTERM)
        raise
    return wrapped(*args, **kwargs)


def _test_once(core: Any) -> None:
    guard: EngineGuard | None = getattr(core.scheduler, ATTRIBUTE, None)
    if guard is not None and guard.watchlist.hooks and not guard.self_test:
        selftest.run(core)


def preprocess_add_request(wrapped: Callable[..., Any], core: Any, args: Any, kwargs: Any) -> Any:
    """Around `EngineCore.preprocess_add_request`: KV made under a clamp is its own.

    The cache is keyed by what edits. A clamped request reads no prefix, because the state of
    its clamp is built up from the tokens that pass through the model.
    """
    guard: EngineGuard | None = getattr(core.scheduler, ATTRIBUTE, None)
    request = args[0] if args else kwargs["request"]
    if guard is not None and request.sampling_params is not None:
        edits = guard.clamped_by(request.sampling_params)
        if edits:
            digest = hashlib.sha256("\n".join(edits).encode()).hexdigest()[:16]
            request.cache_salt = f"{request.cache_salt or ''}saeguard-clamp:{digest}"
            request.sampling_params.skip_reading_prefix_cache = True
    return wrapped(*args, **kwargs)
