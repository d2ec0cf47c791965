"""Read, verify and compile a server's first watch list, and lay out the taps' columns."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import structlog

from saeguard.features.load import load_feature_set
from saeguard.guard.build_watchlist import build_readings
from saeguard.guard.watchlist import WatchList
from saeguard.policy.errors import BundleError
from saeguard.policy.signing import Manifest, check_revision
from saeguard.reload import policy_source, state_dir
from saeguard.reload.columns import Columns, allocate, over_tap_columns, used
from saeguard.vllm.messages import KEY
from saeguard.vllm.settings import ConfigError, Settings, access_of

log = structlog.get_logger("saeguard")


def source_of(settings: Settings) -> policy_source.Source:
    """Return the settings about policies, with the access file and the public key read.

    Raises:
        ConfigError: the key cannot be read, or a setting lacks another that it needs.
        PolicyErrors: the access file is wrong.
    """
    if settings.verify is not None and settings.state is None:
        raise ConfigError(
            f"additional-config: {KEY}.verify needs {KEY}.state, a folder that keeps the highest "
            "revision seen; without it an old bundle could be brought back"
        )
    return policy_source.Source(
        policies=Path(settings.policies),
        feature_sets=Path(settings.feature_sets),
        may_enforce=frozenset(settings.request_may_enforce),
        access=access_of(settings),
        public_key=None if settings.verify is None else _read(settings.verify.public_key),
    )


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"additional-config: {KEY}.verify.public_key: {path}: {error.strerror}"
        ) from error


def load_watchlist(settings: Settings) -> WatchList:
    """Read the policies and feature sets that the settings name, and compile them.

    Raises:
        PolicyErrors, FeatureSetError, WatchListError: with file, position and reason.
    """
    return load(settings).watchlist


def load(settings: Settings) -> policy_source.Loaded:
    """Read, verify and compile what the settings name.

    Raises:
        PolicyErrors, FeatureSetError, WatchListError, BundleError: with file, position and reason.
    """
    if settings.read:
        return policy_source.Loaded(readings_of(Path(settings.feature_sets), settings.read), None)
    loaded = policy_source.load(source_of(settings))
    if loaded.left_out:
        log.warning(
            "policies without calibrated features are not served", policies=list(loaded.left_out)
        )
    for doubt in loaded.weak:
        log.warning("a policy rests on weak evidence", finding=doubt)
    check_manifest(settings, loaded.manifest)
    return loaded


def readings_of(folder: Path, names: Iterable[str]) -> WatchList:
    """Return a watch list of features alone, for a command that judges texts offline.

    Args:
        folder: of feature sets.
        names: `feature_set/feature` of each.

    Raises:
        FeatureSetError, WatchListError: with file, position and reason.
    """
    names = tuple(names)
    sets = sorted({name.rpartition("/")[0] for name in names})
    return build_readings(names, {name: load_feature_set(folder / f"{name}.yaml") for name in sets})


def check_manifest(settings: Settings, manifest: Manifest | None) -> None:
    """Refuse a bundle that is older than one that this server has used.

    Raises:
        BundleError: names both revisions, or the signature is missing.
    """
    if settings.verify is None:
        return
    if manifest is None:
        raise BundleError("this server takes signed policies only")
    assert settings.state is not None
    seen = state_dir.read_revision(Path(settings.state))
    check_revision(manifest, seen, settings.verify.revision)


class Started(NamedTuple):
    """A server's first watch list, over its taps' columns; the same in every process."""

    watchlist: WatchList
    columns: tuple[Columns, ...]
    reads: dict[int, frozenset[int]]
    """By layer, the columns that the watch list reads."""
    manifest: Manifest | None


def start(settings: Settings) -> Started:
    """Read the first watch list, and lay out the columns of the taps.

    Raises:
        PolicyErrors, FeatureSetError, WatchListError, BundleError: with file, position and reason.
    """
    loaded = load(settings)
    columns = allocate(loaded.watchlist, settings.watch_capacity)
    at = [np.arange(len(hook.W)) for hook in loaded.watchlist.hooks]
    return Started(
        over_tap_columns(loaded.watchlist, columns, at),
        columns,
        used(loaded.watchlist.hooks, at),
        loaded.manifest,
    )
