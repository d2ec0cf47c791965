"""What the exit codes of the policy tools mean."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import typer

FINDINGS = 1
"""It ran, and what it looks for was found: a mistake, a failed case, a change above the budget."""
BAD_INPUT = 2
"""The command or a file it was given is wrong, so there is nothing to say."""
COULD_NOT_RUN = 3
"""Something it needs is missing: a package, a model, a checkpoint, a place to write."""


def stop(message: str, code: int) -> NoReturn:
    """Say why there is no result, and end the command.

    Raises:
        typer.Exit: always.
    """
    typer.echo(message, err=True)
    raise typer.Exit(code)


def reason(error: OSError) -> str:
    """Return which file the system would not have, and why, without its number for that."""
    path = error.filename2 or error.filename
    return f"{path}: {error.strerror}" if path is not None else str(error)


def must_be_there(path: Path) -> None:
    """End the command where a file that it is given is none.

    Raises:
        typer.Exit: with `BAD_INPUT`.
    """
    if os.path.isdir(path):  # noqa: PTH112 - pathlib raises at names that are too long
        stop(f"{path}: this is a folder, a file is due", BAD_INPUT)
    if not os.path.exists(path):  # noqa: PTH110 - the same; a pipe is there
        stop(f"{path}: there is no such file", BAD_INPUT)


@contextmanager
def told() -> Iterator[None]:
    """Turn what keeps a policy tool from its work into a message and its exit code."""
    from saeguard.events.reader import LogError
    from saeguard.features.schema import FeatureSetError
    from saeguard.policy.errors import PolicyErrors
    from saeguard.policy_tools.recording import RecordingError

    try:
        yield
    except (LogError, RecordingError, FeatureSetError, PolicyErrors) as error:
        stop(str(error), BAD_INPUT)
    except OSError as error:
        stop(reason(error), COULD_NOT_RUN)


@contextmanager
def model_told() -> Iterator[None]:
    """The same for work that needs a model, whose modules take seconds to import."""
    try:
        from saeguard.features.model_fit import ModelFitError
        from saeguard.features.probe import ProbeError
        from saeguard.hf.model import ModelError
        from saeguard.hf.texts import TextError
        from saeguard.sae import SaeError
    except ImportError as error:
        stop(
            f"this needs {error.name}, which is not installed: pip install saeguard[features]",
            COULD_NOT_RUN,
        )
    try:
        with told():
            yield
    except TextError as error:
        stop(str(error), BAD_INPUT)
    except (ModelError, ModelFitError, ProbeError, SaeError) as error:
        stop(str(error), COULD_NOT_RUN)
