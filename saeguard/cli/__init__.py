"""The `saeguard` command: one verb a module, imported only when it is asked for."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

import typer

VERBS = {
    "serve": "Run `vllm serve` with the guard, policies checked first.",
    "reload": "Have a running server read its policies again.",
    "doctor": "Say what is wrong with this environment, and what to do.",
    "check": "Check policy files, with file, line and column of every mistake.",
    "test": "Run the tests that lie beside the policies.",
    "scan": "Judge a file of texts with a Hugging Face model.",
    "features": "Find latents that detect a behaviour; calibrate; see what else fired.",
    "sae": "Look at, fetch and convert SAE checkpoints.",
    "demo-model": "Make the model of the demo, once.",
    "policy": "Check, test, compare, replay, explain, record, list, start and sign policies.",
}
"""Each verb is `saeguard.cli.<verb>.verb`: a function, or a `typer.Typer` with verbs of its own."""


def build(verb: str | None = None) -> typer.Typer:
    """Return the command line with `verb` loaded and the others present by summary only."""
    app = typer.Typer(
        name="saeguard",
        help="Watch what a language model is thinking while vLLM serves it.",
        no_args_is_help=True,
        add_completion=False,
    )
    app.callback()(lambda: None)  # keeps verbs as verbs even where there is only one
    for name, summary in VERBS.items():
        module = f"{__name__}.{name.replace('-', '_')}"
        loaded = import_module(module).verb if name == verb else lambda: None
        if isinstance(loaded, typer.Typer):
            app.add_typer(loaded, name=name, help=summary)
        else:
            settings = getattr(loaded, "context_settings", None)
            app.command(name, short_help=summary, context_settings=settings)(loaded)
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    verb = next((word for word in arguments if not word.startswith("-")), None)
    build(verb)(args=arguments, prog_name="saeguard")
