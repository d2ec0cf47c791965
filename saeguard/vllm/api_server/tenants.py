"""In the API server: whose request it is, and what it may ask for.

The API key of an HTTP request is kept, as a digest, for as long as the request is handled. Every
way into the engine leads through `AsyncLLM.add_request`; there the tenant is written into the
request's extra arguments, over whatever a client has put there on whichever route.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from saeguard.events.metrics import show
from saeguard.events.records import refusal_event
from saeguard.events.sink import Sink
from saeguard.policy.access import Access, key_digest, matches
from saeguard.vllm.engine_core.admission import ENFORCE, TENANT
from saeguard.vllm.settings import Settings, access_of, name_of, settings_of
from saeguard.yaml_files.findings import did_you_mean
from saeguard.yaml_files.findings import show as quoted

PREFIX = "saeguard"
HEADERS = (b"authorization", b"x-api-key")
"""Where OpenAI's and Anthropic's clients put the key."""

KEY: ContextVar[bytes | None] = ContextVar("saeguard_key", default=None)
"""Digest of the API key of the HTTP request that is handled."""


async def call(wrapped: Callable[..., Any], _app: Any, args: Any, kwargs: Any) -> Any:
    """Around `Starlette.__call__`, through which every HTTP request comes: note its key."""
    scope = args[0] if args else kwargs["scope"]
    token = KEY.set(key_of(scope.get("headers", ())))
    try:
        return await wrapped(*args, **kwargs)
    finally:
        KEY.reset(token)


def key_of(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """Return the digest of the key in a request's headers, None where there is none."""
    for name, value in headers:
        if name.lower() in HEADERS:
            scheme, _, key = value.decode("latin-1").partition(" ")
            if name.lower() == b"x-api-key":
                return key_digest(value.decode("latin-1"))
            if scheme.lower() == "bearer":
                return key_digest(key.strip())
    return None


async def add_request(wrapped: Callable[..., Any], engine: Any, args: Any, kwargs: Any) -> Any:
    """Around `AsyncLLM.add_request`: say whose the request is, refuse what it may not have.

    Raises:
        ValueError: it asks for what it may not have, on a route that `create` is not around; vLLM
            answers with a 400.
    """
    config = engine.vllm_config
    settings = settings_of(config)
    if settings is None:
        return await wrapped(*args, **kwargs)
    lora = kwargs.get("lora_request")
    prompt = args[1] if len(args) > 1 else kwargs["prompt"]
    params = args[2] if len(args) > 2 else kwargs["params"]  # noqa: PLR2004
    for own in (params, getattr(prompt, "sampling_params", None)):
        if own is None or not hasattr(own, "extra_args"):
            continue
        extra = {k: v for k, v in (own.extra_args or {}).items() if k != TENANT}
        refusal = refuse(extra, config, None if lora is None else lora.lora_name)
        if refusal is not None:
            raise ValueError(refusal)
        tenant = _access(settings).tenant(KEY.get())
        if tenant is not None:
            extra[TENANT] = tenant
        own.extra_args = extra or None
    return await wrapped(*args, **kwargs)


def refuse(xargs: Mapping[str, Any] | None, config: Any, model: str | None) -> str | None:
    """Return why a request's extra arguments are not allowed, None where they are.

    Args:
        xargs: as the client sent them.
        config: vLLM's.
        model: as the request names it; None for the model itself.
    """
    asked = {k: v for k, v in (xargs or {}).items() if k.startswith(PREFIX)}
    settings = settings_of(config)
    if not asked or settings is None:
        return None
    tenant = _access(settings).tenant(KEY.get())
    reason = _refusal(asked, settings, config, model, tenant)
    if reason is not None:
        show([["refusals", 1]])
        sink = _sink(settings)
        if sink is not None:
            name = name_of(config.model_config)
            sink.put(partial(refusal_event, reason, model=name, tenant=tenant))
    return reason


def _refusal(
    asked: Mapping[str, Any], settings: Settings, config: Any, model: str | None, tenant: str | None
) -> str | None:
    unknown = sorted(set(asked) - {ENFORCE})
    if unknown:
        return (
            f"vllm_xargs: unknown key {quoted(unknown[0])}; {did_you_mean(unknown[0], [ENFORCE])}"
            f"allowed: {ENFORCE}. A request can become stricter, never less strict"
        )
    names = config.model_config.served_model_name
    ours = {*(names if isinstance(names, list) else [names]), None}
    served = name_of(config.model_config) if model in ours else str(model)
    wanted = str(asked[ENFORCE]).split(",")
    allowed = set(settings.request_may_enforce)
    allowed |= _access(settings).may_ask(tenant, served)
    refused = [name for name in wanted if not matches(name, allowed)]
    if not refused:
        return None
    listed = ", ".join(sorted(allowed)) or "none"
    return (
        f"vllm_xargs.{ENFORCE}: {quoted(refused[0])} is not a policy that these requests may have "
        f"enforced on this server; allowed: {listed}"
    )


@lru_cache(maxsize=4)
def _access(settings: Settings) -> Access:
    """Return the access file as it was when it was needed first; the engine core's is as old."""
    return access_of(settings)


@lru_cache(maxsize=4)
def _open(events: str, queue: int) -> Sink:
    return Sink(Path(events), capacity=queue)


def _sink(settings: Settings) -> Sink | None:
    """Return this process' own way into the event log, opened when there is something to say."""
    return None if settings.events is None else _open(settings.events, settings.event_queue)
