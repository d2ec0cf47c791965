"""The API server's side: verdicts become the `saeguard` object of OpenAI-compatible bodies.

A verdict travels with its own request's output, so it reaches the right API server whatever the
topology. Bodies may carry extra fields, which the unmodified OpenAI client keeps in
`model_extra`: `response.saeguard["flagged"]`.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from http import HTTPStatus
from typing import Any

from saeguard.events.metrics import show
from saeguard.policy.types import strongest_action
from saeguard.vllm.api_server import tenants

KEY = "saeguard"
MESSAGE = "message"
DATA = "data: "


def process_outputs(
    wrapped: Callable[..., Any], _processor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Around `OutputProcessor.process_outputs`: totals reach `/metrics` whoever is still there."""
    for output in args[0] if args else kwargs["engine_core_outputs"]:
        params = output.kv_transfer_params
        if params and KEY in params:
            show(params[KEY].pop("counts", ()))
    return wrapped(*args, **kwargs)


def make_request_output(
    wrapped: Callable[..., Any], state: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Around `RequestState.make_request_output`: take the verdict out of the parameters.

    It is looked for by what it holds: each version of vLLM passes other parameters beside it.
    """
    given = (*args, *kwargs.values())
    params = next((value for value in given if isinstance(value, dict) and KEY in value), None)
    if params is None:
        return wrapped(*args, **kwargs)
    setattr(state, KEY, params[KEY])
    others = {key: value for key, value in params.items() if key != KEY} or None

    def swap(value: Any) -> Any:
        return others if value is params else value

    return wrapped(*map(swap, args), **{key: swap(value) for key, value in kwargs.items()})


def new_completion_output(wrapped: Callable[..., Any], state: Any, args: Any, kwargs: Any) -> Any:
    """Around `RequestState._new_completion_output`: each choice carries its own verdict."""
    output = wrapped(*args, **kwargs)
    said = getattr(state, KEY, None)
    if said is not None and output.finish_reason is not None:
        setattr(output, KEY, said)
    return output


def add_output(wrapped: Callable[..., Any], output: Any, args: Any, kwargs: Any) -> None:
    """Around `RequestOutput.add`: merging two outputs keeps the later verdict."""
    wrapped(*args, **kwargs)
    later = args[0] if args else kwargs["next_output"]
    said = {c.index: getattr(c, KEY) for c in later.outputs if hasattr(c, KEY)}
    for completion in output.outputs:
        if completion.index in said:
            setattr(completion, KEY, said[completion.index])


def summarise(said: Iterable[tuple[int, Mapping[str, Any]]]) -> dict[str, Any] | None:
    """Join the verdicts of a response's choices; each verdict names its choice if there are more.

    Args:
        said: (choice index, what the engine said of it).
    """
    parts = sorted(said, key=lambda part: part[0])
    if not parts:
        return None
    if len(parts) == 1:
        return dict(parts[0][1])
    return {
        **{key: value for key, value in parts[0][1].items() if key != MESSAGE},
        "flagged": any(p["flagged"] for _, p in parts),
        "action": strongest_action(p["action"] for _, p in parts),
        "verdicts": [{"choice": i, **v} for i, p in parts for v in p["verdicts"]],
        "coverage": [{"choice": i, **p["coverage"]} for i, p in parts],
        "errors": sum(p["errors"] for _, p in parts),
    }


def replace_texts(choices: Iterable[Any], said: Mapping[int, Mapping[str, Any]]) -> None:
    """Put a policy's message in place of the text of the choices that it stopped.

    What else tells of that text goes, too: reasoning, calls of tools, token ids, probabilities.
    """
    for choice in choices:
        message = said.get(choice.index, {}).get(MESSAGE)
        if message is None:
            continue
        spoken = getattr(choice, "message", None)
        for part, names in (
            (choice, ("logprobs", "token_ids", "prompt_logprobs")),
            (spoken, ("reasoning", "reasoning_content", "function_call")),
        ):
            for name in names:
                if getattr(part, name, None) is not None:
                    setattr(part, name, None)
        if spoken is None:
            choice.text = message
        else:
            spoken.content = message
            if getattr(spoken, "tool_calls", None):
                spoken.tool_calls = []


def _remember(said: dict[int, Mapping[str, Any]], output: Any, offset: int = 0) -> None:
    for completion in output.outputs:
        if hasattr(completion, KEY):
            said[offset + completion.index] = getattr(completion, KEY)


def _replace_generator(
    args: tuple[Any, ...], kwargs: dict[str, Any], position: int, watch: Callable[[Any], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if "result_generator" in kwargs:
        return args, {**kwargs, "result_generator": watch(kwargs["result_generator"])}
    return (*args[:position], watch(args[position]), *args[position + 1 :]), kwargs


async def chat_full(wrapped: Callable[..., Any], _serving: Any, args: Any, kwargs: Any) -> Any:
    """Around `chat_completion_full_generator`."""
    said: dict[int, Mapping[str, Any]] = {}

    async def watch(results: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for result in results:
            _remember(said, result)
            yield result

    args, kwargs = _replace_generator(args, kwargs, 1, watch)
    body = await wrapped(*args, **kwargs)
    summary = summarise(said.items())
    if summary is not None and hasattr(body, "choices"):
        replace_texts(body.choices, said)
        setattr(body, KEY, summary)
    return body


async def chat_stream(wrapped: Callable[..., Any], _serving: Any, args: Any, kwargs: Any) -> Any:
    """Around `chat_completion_stream_generator`: the chunk that finishes a choice carries it."""
    said: dict[int, Mapping[str, Any]] = {}

    async def watch(results: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for result in results:
            _remember(said, result)
            yield result

    args, kwargs = _replace_generator(args, kwargs, 1, watch)
    async for line in wrapped(*args, **kwargs):
        yield annotate(line, said)


def completion_full(wrapped: Callable[..., Any], _serving: Any, args: Any, kwargs: Any) -> Any:
    """Around `request_output_to_completion_response`; several prompts make several choices."""
    body = wrapped(*args, **kwargs)
    results = args[0] if args else kwargs["final_res_batch"]
    said: dict[int, Mapping[str, Any]] = {}
    offset = 0
    for result in results:
        _remember(said, result, offset)
        offset += len(result.outputs)
    summary = summarise(said.items())
    if summary is not None:
        replace_texts(body.choices, said)
        setattr(body, KEY, summary)
    return body


async def completion_stream(
    wrapped: Callable[..., Any], _serving: Any, args: Any, kwargs: Any
) -> Any:
    """Around `completion_stream_generator`."""
    said: dict[int, Mapping[str, Any]] = {}
    request = args[0] if args else kwargs["request"]
    choices = request.n or 1

    async def watch(results: AsyncIterator[tuple[int, Any]]) -> AsyncIterator[tuple[int, Any]]:
        async for prompt, result in results:
            _remember(said, result, prompt * choices)
            yield prompt, result

    args, kwargs = _replace_generator(args, kwargs, 2, watch)
    async for line in wrapped(*args, **kwargs):
        yield annotate(line, said)


def annotate(line: str, said: Mapping[int, Mapping[str, Any]]) -> str:
    """Add the verdict to a server-sent chunk that finishes a choice; pass others through.

    A policy's message is the last piece of the text: what came before it is out.
    """
    if not said or not line.startswith(DATA) or '"finish_reason":"' not in line.replace(": ", ":"):
        return line
    chunk = json.loads(line[len(DATA) :])
    done = [c["index"] for c in chunk.get("choices", ()) if c.get("finish_reason")]
    summary = summarise((i, said[i]) for i in done if i in said)
    if summary is None:
        return line
    for choice in chunk["choices"]:
        message = said.get(choice["index"], {}).get(MESSAGE)
        if message is not None and choice.get("finish_reason"):
            for name in ("logprobs", "token_ids"):
                choice.pop(name, None)
            if "delta" in choice:
                choice["delta"] = {"content": message}
            else:
                choice["text"] = message
    return f"{DATA}{json.dumps({**chunk, KEY: summary}, separators=(',', ':'))}\n\n"


async def create(wrapped: Callable[..., Any], serving: Any, args: Any, kwargs: Any) -> Any:
    """Around `create_chat_completion` and `create_completion`: what a request may ask for.

    A request can only become stricter, and only by policies the operator lists.
    """
    request = args[0] if args else kwargs["request"]
    config = serving.engine_client.vllm_config
    refusal = tenants.refuse(getattr(request, "vllm_xargs", None), config, request.model)
    if refusal is not None:
        return serving.create_error_response(
            refusal, err_type="BadRequestError", status_code=HTTPStatus.BAD_REQUEST
        )
    return await wrapped(*args, **kwargs)
