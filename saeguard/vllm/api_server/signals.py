"""Pass SIGHUP on from the server's process to its engine cores, which reload the policies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from typing import Any

from saeguard.vllm.patches import Original, assumes, patch
from saeguard.vllm.settings import ConfigError, settings_of

ENGINE = "EngineCore"
"""Prefix of the names that vLLM gives engine core processes."""

assumes(
    "engine cores are children of the process that builds `AsyncLLM`, and their names begin with "
    "`EngineCore`",
    why="SIGHUP is passed on to them",
)


@patch(
    "vllm.v1.engine.async_llm:AsyncLLM.__init__",
    why="the operator knows this process, and its engine cores have started by then",
)
def forward_signals(original: Original, _engine: Any, vllm_config: Any) -> None:
    """Build the engine's client, then pass later SIGHUPs on to the engine cores.

    If several API servers share engine cores, they are not the parents of the engine cores. Then
    only `saeguard reload` reaches the engine cores, because it signals them itself.

    Raises:
        ConfigError: the settings are those of an offline command.
    """
    settings = settings_of(vllm_config)
    if settings is not None and settings.read:
        raise ConfigError(
            "additional-config: saeguard.read: expected policies, found features to read: a server "
            "would hand their values to every client; `saeguard scan` and `record` set it"
        )
    original()
    if settings is None:
        return
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGHUP, _forward)


def _forward(number: int, _frame: Any) -> None:
    for child in multiprocessing.active_children():
        if child.name.startswith(ENGINE) and child.pid is not None:
            os.kill(child.pid, number)
