"""The operator's configuration: `--additional-config '{"saeguard": {...}}'`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from saeguard.errors import InputError
from saeguard.policy.access import UNRESTRICTED, Access, load_access
from saeguard.vllm.messages import KEY
from saeguard.vllm.patches import reads

reads("vllm.config:VllmConfig", "additional_config", why="the operator's settings")
reads("vllm.config:ModelConfig", "model", "served_model_name", why="the model's name in events")


_TUPLES = ("request_may_enforce", "read")
"""Settings that are lists in JSON."""


class ConfigError(InputError):
    """The `saeguard` part of `--additional-config` is not usable."""


class Verify(BaseModel):
    """The signature that policies need."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    public_key: str = Field(description="PEM file of the Ed25519 key; `saeguard policy keygen`.")
    revision: int = Field(
        1, ge=1, description="Oldest revision that is accepted before the state folder holds one."
    )


class Settings(BaseModel):
    """What the operator sets; no request can change any of it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    policies: str = Field("", description="A policy file, or a directory of them.")
    feature_sets: str = Field("feature_sets", description="Directory of feature sets.")
    events: str | None = Field(None, description="File the events are appended to, JSON lines.")
    event_lines: Literal["matches", "all"] = Field(
        "matches",
        description="Which verdicts have a line of their own in the event log, beside the line of "
        "each request: `matches`: those that match or are errors. `all`: every one.",
    )
    event_queue: int = Field(65536, ge=1, description="Events that may wait for the writer.")
    memory_mib: int = Field(1024, ge=1, description="Most MiB that the prefix store may take.")
    request_may_enforce: tuple[str, ...] = Field(
        (), description="Ids of shadow policies that a request may have enforced for itself."
    )
    reload: bool = Field(True, description="Load policy files that change while serving.")
    watch_capacity: int | None = Field(
        None,
        ge=1,
        description="Encoder rows that each layer's tap has room for. Null: half as many again as "
        "the policies need at start, and at least 32 more.",
    )
    state: str | None = Field(
        None,
        description="Folder for what must outlive the server: the highest signed revision that was "
        "in use, and the status that `saeguard reload` reads.",
    )
    access: str | None = Field(
        None,
        description="File that maps API keys to tenants, and policies to tenants and models.",
    )
    verify: Verify | None = Field(
        None, description="Accept signed policies only; needs `state`. Null: no signature needed."
    )
    read: tuple[str, ...] = Field(
        (),
        description="Set by offline commands, in place of `policies`: the `feature_set/feature` "
        "names whose values come back with every text. A server refuses it.",
    )
    stream_flags: bool = Field(
        False,
        description="Tell each stream of a policy in the chunk at which it acts, and not only in "
        "the last one; requests can ask for it.",
    )
    hold_tool_calls: bool = Field(
        False,
        description="Send a stream's tool calls only once its answer has ended and no policy has "
        "stopped it; requests can ask for it.",
    )
    graph: str | None = Field(
        None, description="Set by the guard: digest of what it traces into the model's graph."
    )


def settings_of(vllm_config: Any) -> Settings | None:
    """Return the guard's settings in a vLLM configuration, None if it has none.

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
        settings = Settings.model_validate(
            {**raw, **{name: tuple(raw[name]) for name in _TUPLES if name in raw}}
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
    if bool(settings.policies) == bool(settings.read):
        found = "both" if settings.read else "neither"
        raise ConfigError(
            f"additional-config: {KEY}: expected policies or read, found {found}; a server "
            "takes policies, read is for commands that judge texts offline"
        )
    return settings


def access_of(settings: Settings) -> Access:
    """Return the operator's access file; without one, every policy holds for every request."""
    return UNRESTRICTED if settings.access is None else load_access(Path(settings.access))
