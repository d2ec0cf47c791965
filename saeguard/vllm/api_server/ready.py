"""Tell the operator that the server answers, and why it does not, as the last thing it prints."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import sys
import threading
from typing import Any

import wrapt

from saeguard import start_report

JOIN_S = 10.0
"""Most seconds to wait for each process of the server, so that none prints after the error."""


def attend() -> None:
    """Show the box once the server answers; in the operator's process, show an error at its end."""
    wrapt.register_post_import_hook(_watch, "uvicorn.server")
    if not start_report.is_server():
        return
    atexit.register(_end)
    main = threading.current_thread() is threading.main_thread()
    if main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        # A failing engine core ends this process by a signal while vLLM has no handler yet.
        signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))


def _end() -> None:
    for child in multiprocessing.active_children():
        child.join(JOIN_S)
    start_report.show_error()


def _watch(module: Any) -> None:
    wrapt.wrap_function_wrapper(module, "Server.startup", _startup)


async def _startup(wrapped: Any, server: Any, args: Any, kwargs: Any) -> Any:
    result = await wrapped(*args, **kwargs)
    if server.started:
        start_report.show_ready(_address(server))
    return result


def _address(server: Any) -> str:
    scheme = "https" if server.config.is_ssl else "http"
    for listening in (s for one in server.servers for s in one.sockets):
        name = listening.getsockname()
        if isinstance(name, tuple):
            host = f"[{name[0]}]" if ":" in name[0] else name[0]
            return f"{scheme}://{host}:{name[1]}"
        return f"{name}"
    return f"{scheme}://{server.config.host}:{server.config.port}"
