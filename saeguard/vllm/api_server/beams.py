"""Refuse beam search while a policy is enforced that would not see what beams write.

Each step of a beam is a request of one token, and what a beam wrote before is prompt to the next
step. Only the engine core knows the policies that are enforced, since they change while it serves.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from saeguard.vllm.api_server.tenants import report, tenant_of
from saeguard.vllm.api_server.told import TOLD
from saeguard.vllm.messages import AGAINST_BEAMS
from saeguard.vllm.patches import Original, assumes, calls, patch, reads
from saeguard.vllm.settings import settings_of

SEARCH = "vllm.entrypoints.generate.beam_search"
CLIENT = "vllm.v1.engine.core_client"

calls(f"{CLIENT}:AsyncMPClient.call_utility_async", "method", why="the policies against beams")
calls(f"{CLIENT}:SyncMPClient.call_utility", "method", why="the policies against beams, offline")
reads(f"{CLIENT}:InprocClient", "engine_core", why="the policies against beams, offline")
reads("vllm.v1.engine.async_llm:AsyncLLM", "engine_core", "vllm_config", why="the same")
reads("vllm.v1.engine.llm_engine:LLMEngine", "engine_core", "vllm_config", why="the same")
reads("vllm.lora.request:LoRARequest", "lora_name", why="the model that a request names")
assumes(
    "an engine core answers a client's `call_utility` by calling its method of that name",
    why="the policies that are enforced are known there",
)


async def refusal(engine: Any, adapter: str | None, asked: str | None) -> str | None:
    """Return why a request may not use beam search, None if it may.

    Args:
        engine: `AsyncLLM`.
        adapter: the LoRA adapter that the request names; None for the base model.
        asked: policies that the request asks to have enforced.
    """
    settings = settings_of(engine.vllm_config)
    if settings is None:
        return None
    found = await engine.engine_core.call_utility_async(
        AGAINST_BEAMS, tenant_of(settings), adapter, asked
    )
    reason = _reason(found)
    if reason is not None:
        report(reason, engine.vllm_config, settings)
    return reason


def _reason(policies: list[str]) -> str | None:
    if not policies:
        return None
    return (
        f"use_beam_search: expected false, found true: the policy {policies[0]} is enforced, and "
        "beam search writes in steps of one token that no policy sees as one answer"
    )


@patch(f"{SEARCH}.online:BeamSearchOnlineMixin.beam_search", why="beams evade enforced policies")
async def beam_search(original: Original, serving: Any, lora_request: Any) -> AsyncIterator[Any]:
    """Search, unless an enforced policy would not see what is written.

    Raises:
        ValueError: one would not; vLLM answers with a 400.
    """
    adapter = None if lora_request is None else lora_request.lora_name
    reason = await refusal(serving.engine_client, adapter, None)
    if reason is not None:
        raise ValueError(reason)
    told = TOLD.get()
    if told is not None:
        told.one_answer = True
    async for output in original():
        yield output


@patch(f"{SEARCH}.offline:BeamSearchOfflineMixin.beam_search", why="beams evade enforced policies")
def beam_search_offline(original: Original, llm: Any, lora_request: Any) -> Any:
    """Search, unless an enforced policy would not see what is written.

    Raises:
        ValueError: one would not.
    """
    engine = llm.llm_engine
    if settings_of(engine.vllm_config) is None:
        return original()
    requests = lora_request if isinstance(lora_request, list) else [lora_request]
    client = engine.engine_core
    for adapter in {None if r is None else r.lora_name for r in requests}:
        if hasattr(client, "call_utility"):
            found = client.call_utility(AGAINST_BEAMS, None, adapter, None)
        else:
            found = getattr(client.engine_core, AGAINST_BEAMS)(None, adapter, None)
        reason = _reason(found)
        if reason is not None:
            raise ValueError(reason)
    return original()
