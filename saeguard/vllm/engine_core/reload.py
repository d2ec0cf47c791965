"""Reload policies inside an engine core: start the reloader, handle SIGHUP, check watch lists."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from functools import partial
from pathlib import Path
from typing import Any

from saeguard.guard.roles.assign import check_roles
from saeguard.guard.watchlist import WatchList
from saeguard.reload.reload_state import ReloadContext
from saeguard.reload.reloader import Reloader
from saeguard.vllm.engine_core.guard import EngineGuard
from saeguard.vllm.kv_connector import check_connector
from saeguard.vllm.model_fit import check_models
from saeguard.vllm.patches import reads
from saeguard.vllm.startup import check_manifest, source_of

reads(
    "vllm.config:VllmConfig",
    "model_config",
    "parallel_config",
    "compilation_config",
    why="what a reload may change",
)
reads(
    "vllm.config:ParallelConfig",
    "data_parallel_index",
    why="the name of this engine core's status file",
)
reads("vllm.config:CompilationConfig", "cudagraph_mode", why="captured graphs hold their clamps")
reads("vllm.config:CUDAGraphMode.NONE", why="captured graphs hold their clamps")


def listen(guard: EngineGuard) -> None:
    """Make SIGHUP request a reload, if the engine core has a process of its own.

    The handler is set before the server answers any request, so that a signal never ends the
    process. A signal that arrives before the first reading of the files needs no further reading.
    """
    own = multiprocessing.parent_process() is not None
    if own and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGHUP, partial(_ask, guard))


def _ask(guard: EngineGuard, _signal: int, _frame: Any) -> None:
    if guard.reloader is not None:
        guard.reloader.ask("signal")


def begin(core: Any, guard: EngineGuard) -> None:
    """Start to watch the policy files, unless `reload` is off; called after the self-test."""
    settings = guard.settings
    if not settings.reload:
        return
    config = core.vllm_config
    context = ReloadContext(
        source=source_of(settings),
        versions=guard.versions,
        columns=guard.columns,
        updates=guard.updates,
        report=guard.telemetry.reloaded,
        accept=partial(_accept, config, guard),
        check_manifest=partial(check_manifest, settings),
        prefix_store=guard.prefix_store,
        graphs_hold_clamps=_graphs_are_captured(config),
        state=None if settings.state is None else Path(settings.state),
        engine=int(config.parallel_config.data_parallel_index),
    )
    guard.reloader = Reloader(context, guard.manifest)


def _accept(config: Any, guard: EngineGuard, watchlist: WatchList) -> None:
    """Refuse feature sets for another model, roles without marks, and clamps that would leak.

    Raises:
        ModelFitError: names both shapes.
        RolesError: a policy's scope is a role, and the template does not delimit roles.
        ConnectorError: the KV connector would hand the KV of clamped requests to others.
    """
    check_models(config.model_config, set(watchlist.models) - set(guard.watchlist.models))
    check_roles(watchlist, guard.marks)
    check_connector(config, watchlist)


def _graphs_are_captured(config: Any) -> bool:
    from vllm.config import CUDAGraphMode

    mode = config.compilation_config.cudagraph_mode
    return mode is not None and mode != CUDAGraphMode.NONE
