"""Reloading inside vLLM: when it begins, what this engine accepts, and who may ask for it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from saeguard.guard.roles.assign import check_roles
from saeguard.guard.watchlist import WatchList
from saeguard.reload.reloader import ReloadContext, Reloader
from saeguard.vllm.engine_core.guard import EngineGuard
from saeguard.vllm.model_fit import check_models
from saeguard.vllm.settings import check_manifest, settings_of, source_of

ENGINE = "EngineCore"
"""What vLLM's names of engine core processes begin with."""


def listen(guard: EngineGuard) -> None:
    """Let SIGHUP ask for a reload, in an engine core that has a process of its own.

    It is set before the server answers anybody, so that a signal never ends the process; one that
    comes too early is answered by the first reading, which is still to come.
    """
    own = multiprocessing.parent_process() is not None
    if own and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGHUP, partial(_asked, guard))


def _asked(guard: EngineGuard, _signal: int, _frame: Any) -> None:
    if guard.reloader is not None:
        guard.reloader.ask("signal")


def begin(core: Any, guard: EngineGuard) -> None:
    """Watch the policy files from now on, if the operator lets us; the self-test has passed."""
    settings = guard.settings
    if not settings.reload:
        return
    config = core.vllm_config
    where = ReloadContext(
        source=source_of(settings),
        versions=guard.ledger,
        columns=guard.columns,
        updates=guard.updates,
        report=guard.reloaded,
        accept=partial(_accept, config, guard),
        check_manifest=partial(check_manifest, settings),
        prefix_store=guard.prefix_store,
        graphs_hold_clamps=_graphs_are_captured(config),
        state=None if settings.state is None else Path(settings.state),
        engine=int(config.parallel_config.data_parallel_index),
    )
    guard.reloader = Reloader(where, guard.manifest)


def _accept(config: Any, guard: EngineGuard, watchlist: WatchList) -> None:
    """Refuse feature sets that were made for another model, and roles that cannot be told.

    Raises:
        ModelFitError: names both shapes.
        RolesError: a policy's scope is a role.
    """
    check_models(config.model_config, set(watchlist.models) - set(guard.watchlist.models))
    check_roles(watchlist, guard.marks)


def _graphs_are_captured(config: Any) -> bool:
    from vllm.config import CUDAGraphMode

    mode = config.compilation_config.cudagraph_mode
    return mode is not None and mode != CUDAGraphMode.NONE


# --- the process that the operator knows --------------------------------------------------------


def forward(wrapped: Callable[..., Any], engine: Any, args: Any, kwargs: Any) -> None:
    """Around `AsyncLLM.__init__`: SIGHUP to the server reaches its engine cores.

    They are this process' children and listen by now. Where several API servers share them, they
    are not, and `saeguard reload` signals them itself.
    """
    wrapped(*args, **kwargs)
    if settings_of(engine.vllm_config) is None:
        return
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGHUP, _forward)


def _forward(number: int, _frame: Any) -> None:
    for child in multiprocessing.active_children():
        if child.name.startswith(ENGINE) and child.pid is not None:
            os.kill(child.pid, number)
