"""Patches of the API server; `outputs.py` has those that every answer passes.

A verdict travels with its own request's output, so it reaches the API server that serves the
request, whatever the topology.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from saeguard.vllm.api_server import (
    beams,
    bodies,
    outputs,
    parsers,
    responses_api,
    signals,
    tenants,
    totals,
)
from saeguard.vllm.api_server.told import TOLD, Told
from saeguard.vllm.messages import ENFORCE, KEY
from saeguard.vllm.patches import Original, assumes, calls, patch, reads

__all__ = ["beams", "bodies", "outputs", "parsers", "responses_api", "signals", "totals"]
# imported for the patches that they register

CHAT = "vllm.entrypoints.openai.chat_completion.serving"
COMPLETION = "vllm.entrypoints.openai.completion.serving"

for serving in (f"{CHAT}:OpenAIServingChat", f"{COMPLETION}:OpenAIServingCompletion"):
    reads(serving, "engine_client", why="what a request may ask for")
    calls(
        f"{serving}.create_error_response",
        named=("err_type", "status_code"),
        why="refusing what a request may not ask for",
    )
reads("vllm.v1.engine.async_llm:AsyncLLM", "vllm_config", why="the operator's settings")
reads(f"{CHAT}:ChatCompletionRequest", "vllm_xargs", "model", why="what a request asks for")
reads(f"{COMPLETION}:CompletionRequest", "vllm_xargs", "model", why="what a request asks for")
assumes("response models allow extra fields", why="the `saeguard` object of responses")


@patch(
    f"{CHAT}:OpenAIServingChat.create_chat_completion",
    f"{COMPLETION}:OpenAIServingCompletion.create_completion",
    why="what a request may ask for, and refusing the rest",
)
async def create(original: Original, serving: Any, request: Any) -> Any:
    """Refuse a request that asks for more than the operator allows, and tell what was found.

    A request can only become stricter, and only by policies that the operator lists. An HTTP
    request's answer tells by itself (`bodies.py`); a caller without HTTP, as `vllm run-batch` is,
    gets it here.
    """
    config = serving.engine_client.vllm_config
    refusal = tenants.refuse(getattr(request, "vllm_xargs", None), config, request.model)
    if refusal is None and getattr(request, "use_beam_search", False):
        asked = (request.vllm_xargs or {}).get(ENFORCE)
        adapter = tenants.adapter_of(config, request.model)
        refusal = await beams.refusal(serving.engine_client, adapter, asked)
    if refusal is not None:
        return serving.create_error_response(
            refusal, err_type="BadRequestError", status_code=HTTPStatus.BAD_REQUEST
        )
    if TOLD.get() is not None:
        return await original()
    told = Told()
    record = TOLD.set(told)
    try:
        body = await original()
    finally:
        TOLD.reset(record)
    summary = told.summary()
    if summary is not None and hasattr(body, "choices"):
        for name, value in told.counted(body.usage.model_dump()).items():
            setattr(body.usage, name, value)
        setattr(body, KEY, summary)
    return body
