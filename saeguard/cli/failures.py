"""How an error ends a command: one message on stderr, one exit code, no traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from saeguard.errors import COULD_NOT_RUN, SaeguardError

INTERRUPTED = 130
"""128 and the number of SIGINT, as shells count."""
EXTRAS = {
    "cryptography": "saeguard[sign]",
    "duckdb": "saeguard[tables]",
    "jinja2": "saeguard[features]",
    "pyarrow": "saeguard[tables]",
    "scipy": "saeguard[features]",
    "sklearn": "saeguard[features]",
    "tqdm": "saeguard[features]",
    "transformers": "saeguard[features]",
    "starlette": "saeguard[browse]",
    "torch": "torch",
    "umap": "saeguard[browse]",
    "uvicorn": "saeguard[browse]",
    "vllm": "vllm",
}
"""What to install for a package that not every command needs."""


class Verbs(TyperGroup):
    """A group of verbs whose errors are reported by `reported`."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb."""
        with reported():
            return super().invoke(ctx)


@contextmanager
def reported() -> Iterator[None]:
    """Report an error of the block, and end the command with the error's exit code.

    Raises:
        typer.Exit: the block raised an error of ours, of the system, or for a missing package.
    """
    try:
        yield
    except SaeguardError as error:
        _end(str(error), error.exit_code, error)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        message = f"this needs {package}, which is not installed: pip install '{EXTRAS[package]}'"
        _end(message, COULD_NOT_RUN, error)
    except BrokenPipeError:  # the reader of a pipe has left, which typer ends quietly
        raise
    except OSError as error:
        path = error.filename2 or error.filename
        message = str(error) if path is None else f"{path}: {error.strerror}"
        _end(message, COULD_NOT_RUN, error)
    except KeyboardInterrupt as error:
        _end("interrupted", INTERRUPTED, error)


def _end(message: str, code: int, error: BaseException) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(code) from error
