"""The operator's configuration: `--additional-config '{"saeguard": {...}}'`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from saeguard.features.load import load_feature_set
from saeguard.guard.watchlist import WatchList, build_watchlist
from saeguard.policy.calibrated import leave_out_templates
from saeguard.policy.load import load_policies

log = structlog.get_logger("saeguard")

KEY = "saeguard"


class ConfigError(ValueError):
    """The `saeguard` part of `--additional-config` is not usable."""


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


def load_watchlist(settings: Settings) -> WatchList:
    """Read the policies and feature sets that the settings name, and compile them.

    Raises:
        PolicyErrors, FeatureSetError, WatchListError: with file, place and reason.
    """
    found = load_policies(Path(settings.policies))
    policies, notes = leave_out_templates(found, Path(settings.feature_sets))
    if notes:
        left_out = sorted({p.id for p in found} - {p.id for p in policies})
        log.warning("policies without calibrated features are not served", policies=left_out)
    if not policies:
        raise ConfigError(
            f"additional-config: {KEY}.policies: no policies to serve in {settings.policies}; name "
            "a policy file or a directory that holds *.yaml files whose features are calibrated"
        )
    names = sorted({p.feature_set for p in policies})
    sets = {}
    for name in names:
        loaded = load_feature_set(Path(settings.feature_sets) / f"{name}.yaml")
        sets[name] = loaded
    may_enforce = frozenset(settings.request_may_enforce)
    unknown = may_enforce - {p.id for p in policies}
    if unknown:
        raise ConfigError(
            f"additional-config: {KEY}.request_may_enforce: no policy has the id "
            f"{', '.join(sorted(unknown))}; loaded: {', '.join(sorted({p.id for p in policies}))}"
        )
    return build_watchlist(policies, sets, may_enforce=may_enforce)
