"""The scheduler seam: packets in as a step takes effect, verdicts out with its outputs."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable
from typing import Any

import structlog

from saeguard.guard.prefix.store import PrefixStore
from saeguard.guard.roles import chat_template
from saeguard.guard.roles.assign import RoleMarks
from saeguard.guard.watchlist import WatchList
from saeguard.vllm import selftest
from saeguard.vllm.engine_core import reload
from saeguard.vllm.engine_core.guard import EngineGuard
from saeguard.vllm.settings import Settings, name_of, settings_of, start
from saeguard.vllm.worker.hooks import ATTRIBUTE

log = structlog.get_logger("saeguard")

COUNTS = "counts"
"""Key of what moved in the running totals, taken out again by the API server."""


def init(wrapped: Callable[..., Any], scheduler: Any, args: Any, kwargs: Any) -> None:
    """Around `Scheduler.__init__`: the rules live beside the requests they judge."""
    wrapped(*args, **kwargs)
    settings = settings_of(scheduler.vllm_config)
    guard = None
    if settings is not None:
        model = scheduler.vllm_config.model_config
        started = start(settings)
        guard = EngineGuard(
            started,
            settings,
            name_of(model),
            prefix_store=memory_of(scheduler, started.watchlist, settings),
            marks=role_marks_of(model),
        )
        reload.listen(guard)
    setattr(scheduler, ATTRIBUTE, guard)
    setattr(scheduler.kv_cache_manager, ATTRIBUTE, guard)


def role_marks_of(model_config: Any) -> RoleMarks | str:
    """Return how the model's chat template sets turns apart, or why that cannot be told.

    It is looked at whether a policy asks or not: one that is loaded later may.
    """
    if model_config.tokenizer_mode == "mistral":
        return "with tokenizer_mode mistral there is no chat template to read"
    if model_config.skip_tokenizer_init:
        return "with skip_tokenizer_init there is no tokenizer"
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model_config.tokenizer,
            revision=model_config.tokenizer_revision,
            trust_remote_code=model_config.trust_remote_code,
        )
        return chat_template.role_marks_of(tokenizer)
    except (OSError, ValueError, KeyError) as error:
        return str(error)


def memory_of(scheduler: Any, watchlist: WatchList, settings: Settings) -> PrefixStore | None:
    """Return a memory as large as the prefix cache, None where nothing is cached or watched."""
    manager = scheduler.kv_cache_manager
    if not manager.enable_caching or not watchlist.hooks:
        return None
    from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

    block = scheduler.hash_block_size
    groups = range(manager.num_kv_cache_groups)
    tokens = manager.block_pool.num_gpu_blocks * scheduler.block_size

    def in_cache(key: bytes) -> bool:
        cached = manager.block_pool.cached_block_hash_to_block  # a new one after each reset
        return any(
            cached.get_one_block(make_block_hash_with_group_id(key, group)) is not None
            for group in groups
        )

    prefix_store = PrefixStore(
        block,
        watchlist.columns,
        blocks=tokens // block,
        limit_bytes=settings.memory_mib * 2**20,
        in_cache=in_cache,
    )
    most = min(prefix_store.worst_bytes, prefix_store.limit_bytes) / 2**20
    log.info(
        "saeguard remembers cached prefixes",
        kv_cache_tokens=tokens,
        at_most_mib=round(most, 1),
        bytes_per_fired_latent=8,
    )
    return prefix_store


def add_request(wrapped: Callable[..., Any], scheduler: Any, args: Any, kwargs: Any) -> Any:
    """Around `Scheduler.add_request`: a request has an account before it has tokens."""
    guard: EngineGuard | None = getattr(scheduler, ATTRIBUTE, None)
    if guard is not None:
        guard.admit(args[0] if args else kwargs["request"])
    return wrapped(*args, **kwargs)


def schedule(wrapped: Callable[..., Any], scheduler: Any, args: Any, kwargs: Any) -> Any:
    """Around `Scheduler.schedule`: what the workers must know comes with the pass it is for."""
    scheduled = wrapped(*args, **kwargs)
    guard: EngineGuard | None = getattr(scheduler, ATTRIBUTE, None)
    if guard is not None:
        update = guard.worker_update(new.req_id for new in scheduled.scheduled_new_reqs)
        setattr(scheduled, ATTRIBUTE, update)
    return scheduled


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
    forward_pass = getattr(output, ATTRIBUTE, None)
    if forward_pass is not None:
        guard.before_update(forward_pass, scheduled, output)
    elif scheduled.total_num_scheduled_tokens and guard.watchlist.hooks:
        guard.lost_pass(scheduled.num_scheduled_tokens)
    if guard.stopping:
        _answer_for(guard.stopping, output)
    outputs = wrapped(*args, **kwargs)
    if forward_pass is not None:
        guard.after_update(forward_pass)
    guard.release(scheduled.finished_req_ids)
    for client in outputs.values():
        for item in client.outputs:
            _say(guard, item)
    return outputs


def _say(guard: EngineGuard, item: Any) -> None:
    """Let a request's last output carry its verdicts, and what moved in the running totals."""
    said = None
    if item.finish_reason is not None:
        said = guard.finish(item.request_id, str(item.finish_reason))
    elif _stops_outside(guard.requests.get(item.request_id)):
        said = guard.so_far(item.request_id)
    if said is not None:
        said = {**said, COUNTS: guard.counted()}
        item.kv_transfer_params = {**(item.kv_transfer_params or {}), ATTRIBUTE: said}


def _answer_for(stopping: Iterable[str], output: Any) -> None:
    """Let the scheduler look at requests that must stop though they sampled nothing.

    A prompt can match in any of its chunks. The token that stands in is dropped in
    `update_request`, before anything of it is kept.
    """
    if not output.sampled_token_ids:
        output.sampled_token_ids = [[] for _ in output.req_ids]
    for request_id in stopping:
        i = output.req_id_to_index.get(request_id)
        if i is not None and len(output.sampled_token_ids[i]) == 0:
            output.sampled_token_ids[i] = [0]


def update_request(wrapped: Callable[..., Any], scheduler: Any, args: Any, kwargs: Any) -> Any:
    """Around `Scheduler._update_request_with_output`: end what must stop, keep what is out.

    Only the tokens up to the one that fired stay, as without speculation.
    """
    guard: EngineGuard | None = getattr(scheduler, ATTRIBUTE, None)
    request = args[0] if args else kwargs["request"]
    stop = guard.stopping.pop(request.request_id, None) if guard is not None else None
    if stop is None:
        return wrapped(*args, **kwargs)
    sampled = args[1] if len(args) > 1 else kwargs["new_token_ids"]
    kept = sampled[: max(0, stop.tokens - request.num_tokens)]
    rest = {k: v for k, v in kwargs.items() if k not in {"request", "new_token_ids"}}
    kept, ended = wrapped(request, kept, *args[2:], **rest)
    if not ended:
        from vllm.v1.request import RequestStatus

        request.status = RequestStatus.FINISHED_STOPPED
        request.stop_reason = f"saeguard:{stop.policy}" + (":error" if stop.error else "")
    return kept, True


def computed_blocks(wrapped: Callable[..., Any], manager: Any, args: Any, kwargs: Any) -> Any:
    """Around `KVCacheManager.get_computed_blocks`: `uncached: recompute` reads only what was seen.

    The whole prompt is computed again, and so is looked at.
    """
    found = wrapped(*args, **kwargs)
    guard: EngineGuard | None = getattr(manager, ATTRIBUTE, None)
    request = args[0] if args else kwargs["request"]
    if guard is None or not found[1] or not guard.recomputes(request, found[1]):
        return found
    return (manager.empty_kv_cache_blocks, *(0 for _ in found[1:]))


def reset_prefix_cache(wrapped: Callable[..., Any], manager: Any, args: Any, kwargs: Any) -> Any:
    """Around `KVCacheManager.reset_prefix_cache`: KV is dropped where weights have changed."""
    done = wrapped(*args, **kwargs)
    guard: EngineGuard | None = getattr(manager, ATTRIBUTE, None)
    if guard is not None and guard.prefix_store is not None and done:
        guard.catch_up()
        guard.prefix_store.clear()
    return done


def _stops_outside(request: Any) -> bool:
    """Return whether the API server can end the request by itself: stop strings."""
    params = getattr(request, "sampling_params", None)
    return bool(params is not None and params.stop)


def finish_requests(wrapped: Callable[..., Any], scheduler: Any, args: Any, kwargs: Any) -> Any:
    """Around `Scheduler.finish_requests`: requests that end early get their verdicts, too."""
    result = wrapped(*args, **kwargs)
    guard: EngineGuard | None = getattr(scheduler, ATTRIBUTE, None)
    if guard is not None and guard.requests:
        for request in [r for r in guard.requests.values() if r.is_finished()]:
            guard.finish(request.request_id, str(request.get_finished_reason()))
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
        reload.begin(core, guard)


def preprocess_add_request(wrapped: Callable[..., Any], core: Any, args: Any, kwargs: Any) -> Any:
    """Around `EngineCore.preprocess_add_request`: KV made under a clamp is its own.

    The cache is keyed by what edits. A clamped request reads no prefix, because the state of
    its clamp is built up from the tokens that pass through the model.
    """
    guard: EngineGuard | None = getattr(core.scheduler, ATTRIBUTE, None)
    request = args[0] if args else kwargs["request"]
    if guard is None or request.sampling_params is None:
        return wrapped(*args, **kwargs)
    # Settled once: a list that comes while the request is on its way judges later ones.
    admission = guard.welcome(request.sampling_params, request.lora_request)
    if admission.edits:
        digest = hashlib.sha256(admission.edits.encode()).hexdigest()[:16]
        request.cache_salt = f"{request.cache_salt or ''}saeguard-clamp:{digest}"
        request.sampling_params.skip_reading_prefix_cache = True
    admitted, wave = wrapped(*args, **kwargs)
    setattr(admitted, ATTRIBUTE, admission)
    return admitted, wave
