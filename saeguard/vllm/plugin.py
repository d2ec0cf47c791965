"""vLLM's entry point: called in every process of a server, before anything is built.

Only the standard library is imported at the top. If an entry point cannot be imported, vLLM logs
the error and serves on, unguarded. If the function that it names raises, the process stops. So
everything that can fail is inside the functions.
"""

from __future__ import annotations


def register() -> None:
    """Install the patches; they do nothing unless the server's configuration names `saeguard`.

    Raises:
        ImportError: a dependency is missing or broken; the server must not start.
    """
    from saeguard.vllm import patches
    from saeguard.vllm.api_server import ready

    load_patches()
    if patches.install():
        ready.attend()


def load_patches() -> None:
    """Import every module that registers a patch, and with it all that the guard needs later.

    None of them imports vLLM. vLLM's own modules are imported by the processes that use them.
    """
    from saeguard.vllm.api_server import hooks as _api_server  # noqa: F401
    from saeguard.vllm.engine_core import hooks as _engine_core  # noqa: F401
    from saeguard.vllm.worker import hooks, runner_v1, runner_v2  # noqa: F401
