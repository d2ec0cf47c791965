"""What the commands that read texts share: mistakes in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def mistakes_told() -> Iterator[None]:
    """Turn a mistake in a file or an option into its message and exit code 1."""
    from saeguard.cli.failures import reason
    from saeguard.features.load import FeatureSetError
    from saeguard.features.model_fit import ModelFitError
    from saeguard.features.probe import ProbeError
    from saeguard.features.search import SearchError
    from saeguard.guard.roles.assign import RolesError
    from saeguard.guard.watchlist import WatchListError
    from saeguard.hf.model import ModelError
    from saeguard.hf.texts import TextError
    from saeguard.policy.errors import PolicyErrors
    from saeguard.sae import SaeError

    try:
        yield
    except (
        FeatureSetError, ModelError, ModelFitError, OSError, PolicyErrors, ProbeError, RolesError,
        SaeError, SearchError, TextError, WatchListError,
    ) as error:  # fmt: skip
        typer.echo(reason(error) if isinstance(error, OSError) else str(error), err=True)
        raise typer.Exit(1) from error
