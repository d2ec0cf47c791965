"""Find the tenant of a request, and refuse what the request may not ask for.

This runs in the API server. It keeps the digest of an HTTP request's API key while the request is
handled. Every route into the engine goes through `AsyncLLM.add_request`. There the tenant is
written into the request's extra arguments, over anything that a client sent under that name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from saeguard.events.metrics import show
from saeguard.events.records import refusal_event
from saeguard.events.sink import Sink
from saeguard.policy.access import Access, key_digest, matches
from saeguard.vllm.api_server.told import TOLD
from saeguard.vllm.messages import ENFORCE, HOLD_TOOL_CALLS, STREAM_FLAGS, TENANT
from saeguard.vllm.messages import KEY as PREFIX
from saeguard.vllm.patches import Original, assumes, patch, reads
from saeguard.vllm.settings import Settings, access_of, name_of, settings_of
from saeguard.yaml_files.findings import did_you_mean
from saeguard.yaml_files.findings import show as quoted

HEADERS = (b"authorization", b"x-api-key")
"""Headers in which OpenAI's and Anthropic's clients send the key."""

SWITCHES = (STREAM_FLAGS, HOLD_TOOL_CALLS)
"""What any request may ask for about its own stream."""

KEY: ContextVar[bytes | None] = ContextVar("saeguard_key", default=None)
"""Digest of the API key of the HTTP request that is being handled."""

reads("vllm.v1.engine.async_llm:AsyncLLM", "vllm_config", why="the operator's settings")
reads("vllm.sampling_params:SamplingParams", "extra_args", why="what a request asks for")
reads("vllm.lora.request:LoRARequest", "lora_name", why="the model that a request names")
reads("vllm.config:ModelConfig", "model", "served_model_name", why="the model that is served")
assumes(
    "every route to the engine goes through `AsyncLLM.add_request`, in the context in which "
    "Starlette handles the HTTP request",
    why="the tenant of a request is that of its HTTP request's API key",
)


def key_of(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """Return the digest of the API key in a request's headers, None if they hold no key."""
    for name, value in headers:
        if name.lower() in HEADERS:
            scheme, _, key = value.decode("latin-1").partition(" ")
            if name.lower() == b"x-api-key":
                return key_digest(value.decode("latin-1"))
            if scheme.lower() == "bearer":
                return key_digest(key.strip())
    return None


@patch(
    "vllm.v1.engine.async_llm:AsyncLLM.add_request",
    why="the tenant is written over anything that a client sent",
    differs="takes `session_id`, too, from 0.28, and `kv_hints` from 0.32; passed through",
)
async def add_request(
    original: Original, engine: Any, prompt: Any, params: Any, lora_request: Any
) -> Any:
    """Write the tenant into a request, and refuse what the request may not ask for.

    Raises:
        ValueError: it asks for too much, on a route that `hooks.create` does not wrap; vLLM answers
            with a 400.
    """
    config = engine.vllm_config
    settings = settings_of(config)
    if settings is None:
        return await original()
    for own in (params, getattr(prompt, "sampling_params", None)):
        if own is None or not hasattr(own, "extra_args"):
            continue
        extra = {k: v for k, v in (own.extra_args or {}).items() if k != TENANT}
        refusal = refuse(extra, config, None if lora_request is None else lora_request.lora_name)
        if refusal is not None:
            raise ValueError(refusal)
        tenant = _access(settings).tenant(KEY.get())
        if tenant is not None:
            extra[TENANT] = tenant
        own.extra_args = extra or None
        told = TOLD.get()
        if told is not None and (settings.hold_tool_calls or extra.get(HOLD_TOOL_CALLS)):
            told.holds_tool_calls = True
    return await original()


def refuse(xargs: Mapping[str, Any] | None, config: Any, model: str | None) -> str | None:
    """Return why a request's extra arguments are not allowed, None if they are.

    Args:
        xargs: as the client sent them.
        config: vLLM's.
        model: as the request names it; None for the base model.
    """
    asked = {k: v for k, v in (xargs or {}).items() if k.startswith(PREFIX)}
    settings = settings_of(config)
    if not asked or settings is None:
        return None
    reason = _refusal(asked, settings, config, model, tenant_of(settings))
    if reason is not None:
        report(reason, config, settings)
    return reason


def adapter_of(config: Any, model: str | None) -> str | None:
    """Return the LoRA adapter that a request's `model` names, None if it names the base model."""
    names = config.model_config.served_model_name
    base = {*(names if isinstance(names, list) else [names]), name_of(config.model_config), None}
    return None if model in base else model


def report(reason: str, config: Any, settings: Settings) -> None:
    """Count a refusal, and write its event."""
    show([["refusals", 1]])
    sink = _sink(settings)
    if sink is not None:
        name = name_of(config.model_config)
        sink.put(partial(refusal_event, reason, model=name, tenant=tenant_of(settings)))


def tenant_of(settings: Settings) -> str | None:
    """Return the tenant whose HTTP request is being handled, None if it is nobody's."""
    return _access(settings).tenant(KEY.get())


def _refusal(
    asked: Mapping[str, Any], settings: Settings, config: Any, model: str | None, tenant: str | None
) -> str | None:
    unknown = sorted(set(asked) - {ENFORCE, *SWITCHES})
    if unknown:
        known = [ENFORCE, *SWITCHES]
        return (
            f"vllm_xargs: unknown key {quoted(unknown[0])}; {did_you_mean(unknown[0], known)}"
            f"allowed: {', '.join(known)}. A request can become stricter, never less strict"
        )
    for name in SWITCHES:
        if str(asked.get(name, 1)) not in {"1", "True"}:
            return f"vllm_xargs.{name}: expected 1, found {quoted(asked[name])}; leave it out"
    if ENFORCE not in asked:
        return None
    served = adapter_of(config, model) or name_of(config.model_config)
    wanted = str(asked[ENFORCE]).split(",")
    allowed = set(settings.request_may_enforce)
    allowed |= _access(settings).may_ask(tenant, served)
    refused = [name for name in wanted if not matches(name, allowed)]
    if not refused:
        return None
    listed = ", ".join(sorted(allowed)) or "no policy"
    return (
        f"vllm_xargs.{ENFORCE}: {quoted(refused[0])} is not a policy that these requests may have "
        f"enforced on this server; allowed: {listed}"
    )


@lru_cache(maxsize=4)
def _access(settings: Settings) -> Access:
    """Return the access file, read once per process.

    The engine core too reads it only at start, so a change needs a restart.
    """
    return access_of(settings)


@lru_cache(maxsize=4)
def _open(events: str, queue: int) -> Sink:
    return Sink(Path(events), capacity=queue)


def _sink(settings: Settings) -> Sink | None:
    """Return this process' own sink to the event log, None if there is no event log."""
    return None if settings.events is None else _open(settings.events, settings.event_queue)
