"""Patches for the start and end of engine cores and requests; `step.py` has those of a step."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
from functools import partial
from typing import Any

import structlog

from saeguard.errors import CannotRunError
from saeguard.guard.roles import chat_template
from saeguard.guard.roles.assign import RoleMarks
from saeguard.start_report import failed
from saeguard.vllm.attributes import ADMISSION, ENGINE_GUARD
from saeguard.vllm.engine_core import prefix_cache, reload, selftest, step, totals
from saeguard.vllm.engine_core.beams import against_beams
from saeguard.vllm.engine_core.guard import EngineGuard
from saeguard.vllm.messages import AGAINST_BEAMS
from saeguard.vllm.patches import Original, assumes, patch, reads
from saeguard.vllm.settings import name_of, settings_of
from saeguard.vllm.startup import start

__all__ = ["prefix_cache", "step"]  # imported for the patches that they register

log = structlog.get_logger("saeguard")

SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
CORE = "vllm.v1.engine.core:EngineCore"

reads(
    SCHEDULER,
    "kv_cache_manager",
    why="the engine core's guard hangs on both",
)
reads("vllm.config:VllmConfig", "additional_config", "model_config", why="the operator's settings")
reads(
    "vllm.config:ParallelConfig",
    "data_parallel_index",
    why="which engine core a metric is of",
)
reads(
    "vllm.config:ModelConfig",
    "model",
    "served_model_name",
    "tokenizer",
    "tokenizer_mode",
    "tokenizer_revision",
    "trust_remote_code",
    "skip_tokenizer_init",
    why="the model's name and its chat template",
)
reads(
    "vllm.v1.request:Request",
    "is_finished",
    "get_finished_reason",
    why="verdicts of requests that end early",
)
reads(
    "vllm.v1.engine:EngineCoreRequest",
    "cache_salt",
    "sampling_params",
    "lora_request",
    "resumable",
    why="a clamped request's KV cache has a key of its own",
)
reads(
    "vllm.sampling_params:SamplingParams",
    "skip_reading_prefix_cache",
    why="a clamped request reads no cached prefix",
)
reads(CORE, "scheduler", why="the engine core's guard hangs on it")
assumes(
    "`EngineCore.preprocess_add_request` returns `(Request, wave)`, and the `Request` takes a "
    "further attribute; it may run in another thread than the scheduler",
    why="what judges a request is decided there, together with its cache key",
)
assumes(
    "plugins of the entry point group `vllm.general_plugins` are called in every process, before "
    "models are built",
    why="patches are in place before what they patch is used",
)


class SessionError(CannotRunError):
    """A client wants to go on with a request that vLLM has ended; the guard cannot judge that."""


@patch(f"{SCHEDULER}.__init__", why="the engine core's guard lives beside the requests")
def init(original: Original, scheduler: Any, vllm_config: Any) -> None:
    """Build the scheduler, and its guard if the server is configured for one."""
    original()
    settings = settings_of(vllm_config)
    guard = None
    if settings is not None:
        model = vllm_config.model_config
        started = start(settings)
        guard = EngineGuard(
            started,
            settings,
            name_of(model),
            prefix_store=prefix_cache.prefix_store_of(scheduler, started.watchlist, settings),
            marks=role_marks_of(model),
            engine=int(vllm_config.parallel_config.data_parallel_index),
        )
        prefix_cache.skip_unread(scheduler, guard)
        reload.listen(guard)
        ENGINE_GUARD.set(scheduler, guard)
        ENGINE_GUARD.set(scheduler.kv_cache_manager, guard)


def role_marks_of(model_config: Any) -> RoleMarks | str:
    """Return how the model's chat template delimits messages, or why that is not known.

    The template is read even if no policy needs it, since one that is loaded later may.
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
    except Exception as error:  # noqa: BLE001 - a tokenizer's code may raise anything
        return f"its tokenizer cannot be loaded: {type(error).__name__}: {error}"


@patch(f"{CORE}.__init__", why="nothing is served before the self-test has passed")
def engine_core_init(original: Original, core: Any) -> None:
    """Build the engine core and test it; `run_busy_loop` tests one with a process of its own."""
    original()
    _test_once(core)


@patch(
    "vllm.v1.engine.core:EngineCoreProc.run_busy_loop",
    "vllm.v1.engine.core:DPEngineCoreProc.run_busy_loop",
    why="nothing is served before the self-test has passed",
)
def run_busy_loop(original: Original, core: Any) -> Any:
    """Test an engine core that has a process of its own, before it serves.

    In such a process, vLLM loads plugins while `EngineCore.__init__` runs, too late to patch that.
    Requests wait until the loop begins, so none is served before the test. If the test fails, the
    parent process is ended, too: an API server that is still starting would wait forever.
    """
    try:
        _test_once(core)
    except Exception as error:
        failed(error)  # before the parent ends, which prints it
        parent = multiprocessing.parent_process()
        if parent is not None and parent.pid is not None:
            log.exception("saeguard: the server ends, because it would be unguarded")
            os.kill(parent.pid, signal.SIGTERM)
        raise
    return original()


def _test_once(core: Any) -> None:
    guard = ENGINE_GUARD.get(core.scheduler)
    if guard is not None:
        setattr(core, AGAINST_BEAMS, partial(against_beams, guard))
    if guard is not None and guard.watchlist.hooks and not guard.self_test:
        selftest.run(core, guard)
        reload.begin(core, guard)
        totals.begin(core, guard)


@patch(
    f"{CORE}.preprocess_add_request",
    why="`cache_salt` and `skip_reading_prefix_cache` of a request that a policy may clamp",
)
def preprocess_add_request(original: Original, core: Any, request: Any) -> Any:
    """Decide which policies judge a request, and keep the KV of clamped requests apart.

    The decision is made once. A version that becomes current later judges later requests only. The
    prefix cache is keyed by the clamps. A clamped request reads no cached prefix, because the state
    of its clamps is built from the tokens that pass through the model.

    Raises:
        SessionError: vLLM reports it to the client as an error of this request.
    """
    guard = ENGINE_GUARD.get(core.scheduler)
    if guard is None or request.sampling_params is None:
        return original()
    if request.resumable:
        raise SessionError(
            "saeguard: a request whose prompt is sent in parts (streaming input, realtime) is not "
            "supported: a stop could not end it, and later parts would not be judged; send the "
            "whole prompt at once"
        )
    admission = guard.admission(request.sampling_params, request.lora_request)
    if admission.edits:
        digest = hashlib.sha256(admission.edits.encode()).hexdigest()[:16]
        request.cache_salt = f"{request.cache_salt or ''}saeguard-clamp:{digest}"
        request.sampling_params.skip_reading_prefix_cache = True
    admitted, wave = original()
    ADMISSION.set(admitted, admission)
    return admitted, wave


@patch(f"{SCHEDULER}.add_request", why="one ledger entry per request, before it has tokens")
def add_request(original: Original, scheduler: Any, request: Any) -> Any:
    """Enter a request into the ledger."""
    guard = ENGINE_GUARD.get(scheduler)
    if guard is not None:
        guard.admit(request, ADMISSION.get(request))
    return original()


@patch(f"{SCHEDULER}.finish_requests", why="requests that end early get their verdicts, too")
def finish_requests(original: Original, scheduler: Any) -> Any:
    """End the requests that a client or an error has ended, with verdicts and events."""
    result = original()
    guard = ENGINE_GUARD.get(scheduler)
    if guard is not None and guard.requests:
        for request in [r for r in guard.requests.values() if r.is_finished()]:
            guard.finish(request.request_id, str(request.get_finished_reason()))
    return result


@patch(f"{SCHEDULER}.shutdown", why="no event is lost")
def shutdown(original: Original, scheduler: Any) -> Any:
    """Write the events that are still queued, then shut down."""
    guard = ENGINE_GUARD.get(scheduler)
    if guard is not None:
        guard.close()
    return original()
