"""vLLM's entry point: called in every process of a server, before anything is built.

Nothing but the standard library is imported up here. vLLM logs and swallows an entry point that
cannot be imported and would go on serving unguarded, while an error raised by the function it
calls stops the process; so everything that can fail is inside.
"""

from __future__ import annotations


def register() -> None:
    """Install the seams; they stay idle unless the server's configuration names `saeguard`.

    Raises:
        ImportError: a dependency is missing or broken; the server must not start.
    """
    from saeguard.vllm import patches

    patches.install()
