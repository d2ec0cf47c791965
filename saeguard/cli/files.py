"""What the commands that read texts share: whole files or none, and mistakes in one line."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old content or all of the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o666 & ~_umask())  # mkstemp makes it private
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def mistakes_told() -> Iterator[None]:
    """Turn a mistake in a file or an option into its message and exit code 1."""
    from saeguard.cli.exits import reason
    from saeguard.features.load import FeatureSetError
    from saeguard.features.probe import ProbeError
    from saeguard.features.search import SearchError
    from saeguard.guard.turns import RolesError
    from saeguard.guard.watchlist import WatchListError
    from saeguard.hf.model import ModelError
    from saeguard.hf.texts import TextError
    from saeguard.policy.errors import PolicyErrors
    from saeguard.sae import SaeError

    try:
        yield
    except (
        FeatureSetError, ModelError, OSError, PolicyErrors, ProbeError, RolesError, SaeError,
        SearchError, TextError, WatchListError,
    ) as error:  # fmt: skip
        typer.echo(reason(error) if isinstance(error, OSError) else str(error), err=True)
        raise typer.Exit(1) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
