"""Patches of the API server: they put verdicts from the engine's outputs into responses.

A verdict travels with its own request's output, so it reaches the API server that serves the
request, whatever the topology.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Any

from saeguard.events.metrics import show
from saeguard.vllm.api_server import signals, tenants, totals
from saeguard.vllm.api_server.responses import (
    ByChoice,
    annotate,
    collect,
    replace_texts,
    summarise,
)
from saeguard.vllm.attributes import CHOICE_VERDICTS, REQUEST_VERDICTS
from saeguard.vllm.messages import COUNTS, KEY
from saeguard.vllm.patches import Original, assumes, calls, patch, reads

__all__ = ["signals", "totals"]  # imported for the patches that they register

OUTPUTS = "vllm.v1.engine.output_processor"
CHAT = "vllm.entrypoints.openai.chat_completion.serving"
COMPLETION = "vllm.entrypoints.openai.completion.serving"

reads(
    "vllm.v1.engine:EngineCoreOutput",
    "kv_transfer_params",
    why="the verdicts of a request travel in it",
)
reads("vllm.outputs:RequestOutput", "outputs", why="the verdict of each choice")
reads("vllm.outputs:CompletionOutput", "index", "finish_reason", why="the verdict of each choice")
for serving in (f"{CHAT}:OpenAIServingChat", f"{COMPLETION}:OpenAIServingCompletion"):
    reads(serving, "engine_client", why="what a request may ask for")
    calls(
        f"{serving}.create_error_response",
        named=("err_type", "status_code"),
        why="refusing what a request may not ask for",
    )
reads("vllm.v1.engine.async_llm:AsyncLLM", "vllm_config", why="the operator's settings")
reads(f"{CHAT}:ChatCompletionRequest", "vllm_xargs", "model", why="what a request asks for")
reads(f"{COMPLETION}:CompletionRequest", "vllm_xargs", "model", "n", why="what a request asks for")
assumes("response models allow extra fields", why="the `saeguard` object of responses")


@patch(
    f"{OUTPUTS}:OutputProcessor.process_outputs",
    why="running totals reach `/metrics`, also if no client waits for the output any more",
    differs="takes `weight_version`, too, from 0.32; passed through",
)
def process_outputs(original: Original, _processor: Any, engine_core_outputs: Any) -> Any:
    """Remove changes of the running totals from a step's outputs, and add them to the metrics."""
    for output in engine_core_outputs:
        params = output.kv_transfer_params
        if params and KEY in params:
            show(params[KEY].pop(COUNTS, ()))
    return original()


@patch(
    f"{OUTPUTS}:RequestState.make_request_output",
    why="the verdicts are taken out of `kv_transfer_params`, which the client may see",
    differs="takes `error`, too, from 0.32; passed through",
)
def make_request_output(original: Original, state: Any, kv_transfer_params: Any) -> Any:
    """Keep a request's verdicts for its choice, and pass vLLM the parameters without them."""
    if not kv_transfer_params or KEY not in kv_transfer_params:
        return original()
    REQUEST_VERDICTS.set(state, kv_transfer_params[KEY])
    others = {key: value for key, value in kv_transfer_params.items() if key != KEY}
    return original(kv_transfer_params=others or None)


@patch(f"{OUTPUTS}:RequestState._new_completion_output", why="the verdict of each choice")
def new_completion_output(original: Original, state: Any) -> Any:
    """Set a request's verdicts on its last `CompletionOutput`."""
    output = original()
    verdicts = REQUEST_VERDICTS.get(state)
    if verdicts is not None and output.finish_reason is not None:
        CHOICE_VERDICTS.set(output, verdicts)
    return output


@patch("vllm.outputs:RequestOutput.add", why="merging two outputs keeps the verdicts")
def add_output(original: Original, output: Any, next_output: Any) -> None:
    """Merge two outputs; the later one's verdicts replace the earlier one's."""
    original()
    later: ByChoice = {}
    collect(later, next_output)
    for completion in output.outputs:
        if completion.index in later:
            CHOICE_VERDICTS.set(completion, later[completion.index])


@patch(
    f"{CHAT}:OpenAIServingChat.chat_completion_full_generator",
    why="the `saeguard` object of responses",
)
async def chat_full(original: Original, _serving: Any, result_generator: Any) -> Any:
    """Add the verdicts to a chat completion that is not streamed."""
    found: ByChoice = {}

    async def watch() -> AsyncIterator[Any]:
        async for result in result_generator:
            collect(found, result)
            yield result

    body = await original(result_generator=watch())
    summary = summarise(found.items())
    if summary is not None and hasattr(body, "choices"):
        replace_texts(body.choices, found)
        setattr(body, KEY, summary)
    return body


@patch(
    f"{CHAT}:OpenAIServingChat.chat_completion_stream_generator",
    why="the `saeguard` object of responses",
)
async def chat_stream(original: Original, _serving: Any, result_generator: Any) -> Any:
    """Add the verdicts to the chunk of a streamed chat completion that finishes a choice."""
    found: ByChoice = {}

    async def watch() -> AsyncIterator[Any]:
        async for result in result_generator:
            collect(found, result)
            yield result

    async for line in original(result_generator=watch()):
        yield annotate(line, found)


@patch(
    f"{COMPLETION}:OpenAIServingCompletion.request_output_to_completion_response",
    why="the `saeguard` object of responses",
)
def completion_full(original: Original, _serving: Any, final_res_batch: Any) -> Any:
    """Add the verdicts to a completion that is not streamed; it may have several prompts."""
    body = original()
    found: ByChoice = {}
    offset = 0
    for result in final_res_batch:
        collect(found, result, offset)
        offset += len(result.outputs)
    summary = summarise(found.items())
    if summary is not None:
        replace_texts(body.choices, found)
        setattr(body, KEY, summary)
    return body


@patch(
    f"{COMPLETION}:OpenAIServingCompletion.completion_stream_generator",
    why="the `saeguard` object of responses",
)
async def completion_stream(
    original: Original, _serving: Any, request: Any, result_generator: Any
) -> Any:
    """Add the verdicts to the chunk of a streamed completion that finishes a choice."""
    found: ByChoice = {}
    choices = request.n or 1

    async def watch() -> AsyncIterator[tuple[int, Any]]:
        async for prompt, result in result_generator:
            collect(found, result, prompt * choices)
            yield prompt, result

    async for line in original(result_generator=watch()):
        yield annotate(line, found)


@patch(
    f"{CHAT}:OpenAIServingChat.create_chat_completion",
    f"{COMPLETION}:OpenAIServingCompletion.create_completion",
    why="what a request may ask for, and refusing the rest",
)
async def create(original: Original, serving: Any, request: Any) -> Any:
    """Refuse a request that asks for more than the operator allows.

    A request can only become stricter, and only by policies that the operator lists.
    """
    config = serving.engine_client.vllm_config
    refusal = tenants.refuse(getattr(request, "vllm_xargs", None), config, request.model)
    if refusal is not None:
        return serving.create_error_response(
            refusal, err_type="BadRequestError", status_code=HTTPStatus.BAD_REQUEST
        )
    return await original()
