"""The operator's configuration: `--additional-config '{"saeguard": {...}}'`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from saeguard.errors import InputError
from saeguard.guard.watchlist import WatchList
from saeguard.policy.access import EVERYBODY, Access, load_access
from saeguard.policy.errors import BundleError
from saeguard.policy.signing import Manifest, check_revision
from saeguard.reload import policy_source, state_dir
from saeguard.reload.columns import Columns, allocate, over_tap_columns, used

log = structlog.get_logger("saeguard")

KEY = "saeguard"


class ConfigError(InputError):
    """The `saeguard` part of `--additional-config` is not usable."""


class Verify(BaseModel):
    """Whose signature policies need."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    public_key: str = Field(description="PEM file of the Ed25519 key; `saeguard policy keygen`.")
    revision: int = Field(
        1, ge=1, description="Oldest revision that is taken where none has been seen yet."
    )


class Settings(BaseModel):
    """What the operator sets; requests never reach any of it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    policies: str = Field(description="A policy file, or a directory of them.")
    feature_sets: str = Field("feature_sets", description="Directory of feature sets.")
    events: str | None = Field(None, description="File the events are appended to, JSON lines.")
    event_queue: int = Field(65536, ge=1, description="Events that may wait for the writer.")
    memory_mib: int = Field(
        1024, ge=1, description="Most that may be held of what was seen of cached prefixes."
    )
    request_may_enforce: tuple[str, ...] = Field(
        (), description="Ids of shadow policies that a request may have enforced for itself."
    )
    reload: bool = Field(True, description="Take up policy files that change while serving.")
    watch_capacity: int | None = Field(
        None,
        ge=1,
        description="Encoder rows that each layer's tap has room for; none: half as many again as "
        "the policies need at start, and at least 32 more.",
    )
    state: str | None = Field(
        None,
        description="Folder for what must outlive the server: the highest signed revision that was "
        "in use, and what `saeguard reload` asks about.",
    )
    access: str | None = Field(
        None,
        description="File that maps API keys to tenants and says which policies hold for whom.",
    )
    verify: Verify | None = Field(
        None, description="Take signed policies only; needs `state`. None: no signature is needed."
    )
    graph: str | None = Field(None, description="Set by the guard: digest of what it traces in.")


def settings_of(vllm_config: Any) -> Settings | None:
    """Return the guard's settings of a vLLM configuration, None where there are none.

    Raises:
        ConfigError: a key is unknown or a value has the wrong type.
    """
    additional = getattr(vllm_config, "additional_config", None)
    if not isinstance(additional, Mapping) or KEY not in additional:
        return None
    return parse_settings(additional[KEY])


def name_of(model_config: Any) -> str:
    """Return the name that a model is served under, the first of several."""
    name = model_config.served_model_name
    return str(name[0] if isinstance(name, list) else name or model_config.model)


def parse_settings(raw: Any) -> Settings:
    """Check one `saeguard` object.

    Raises:
        ConfigError: names the key, what was found and what is allowed.
    """
    try:
        return Settings.model_validate(
            {**raw, "request_may_enforce": tuple(raw.get("request_may_enforce", ()))}
            if isinstance(raw, Mapping)
            else raw
        )
    except ValidationError as error:
        lines = [
            f"additional-config: {KEY}.{'.'.join(map(str, e['loc'])) or '(all)'}: {e['msg']}"
            f" (found {e['input']!r})"
            for e in error.errors()
        ]
        allowed = ", ".join(Settings.model_fields)
        raise ConfigError("\n".join([*lines, f"allowed keys: {allowed}"])) from error


def source_of(settings: Settings) -> policy_source.Source:
    """Return where policies come from; reads the access file and the public key.

    Raises:
        ConfigError: one of them is not there, or a setting lacks another.
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


def access_of(settings: Settings) -> Access:
    """Return the operator's access file; everybody's policies hold for everybody without one."""
    return EVERYBODY if settings.access is None else load_access(Path(settings.access))


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
        PolicyErrors, FeatureSetError, WatchListError: with file, place and reason.
    """
    return load(settings).watchlist


def load(settings: Settings) -> policy_source.Loaded:
    """Read, verify and compile what the settings name.

    Raises:
        PolicyErrors, FeatureSetError, WatchListError, BundleError: with file, place and reason.
    """
    loaded = policy_source.load(source_of(settings))
    if loaded.left_out:
        log.warning(
            "policies without calibrated features are not served", policies=list(loaded.left_out)
        )
    check_manifest(settings, loaded.manifest)
    return loaded


def check_manifest(settings: Settings, manifest: Manifest | None) -> None:
    """Refuse a bundle that is older than one that was in use here.

    Raises:
        BundleError: tells both revisions.
    """
    if settings.verify is None:
        return
    if manifest is None:
        raise BundleError("this server takes signed policies only")
    assert settings.state is not None
    seen = state_dir.read_revision(Path(settings.state))
    check_revision(manifest, seen, settings.verify.revision)


class Started(NamedTuple):
    """The first list of a server, over its taps' columns; the same in every process."""

    watchlist: WatchList
    columns: tuple[Columns, ...]
    reads: dict[int, frozenset[int]]
    manifest: Manifest | None


def start(settings: Settings) -> Started:
    """Read the first list, and lay out the columns of the taps.

    Raises:
        PolicyErrors, FeatureSetError, WatchListError, BundleError: with file, place and reason.
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
