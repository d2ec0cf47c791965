"""Send the demo's prompts to the server with the unmodified `openai` client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openai import AsyncOpenAI

SEED = 20260


@dataclass(frozen=True, slots=True)
class Answer:
    """One request and what came back."""

    id: str
    behaviour: str
    """What the prompt invites; `benign` for ordinary prompts."""
    messages: tuple[Mapping[str, str], ...]
    text: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    finish: str
    streamed: bool
    response_id: str
    said: Mapping[str, Any]
    """The response's `saeguard` object."""
    seconds: float
    enforced: str | None = None
    """The shadow policy that the request asked to have enforced."""
    arrived: tuple[float, ...] = ()
    """Seconds from sending the request to receiving each output token; empty if not streamed."""


class NotGuardedError(RuntimeError):
    """A response came back without a word from the guard."""


async def ask_all(
    prompts: Sequence[Mapping[str, Any]],
    *,
    url: str,
    model: str,
    max_tokens: int,
    enforce: str | None = None,
    done: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """Send every prompt at once, every other one streaming; keep their order.

    Raises:
        NotGuardedError: a response has no `saeguard` object.
    """
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=300) as client:

        async def one(i: int, prompt: Mapping[str, Any]) -> Answer:
            answer = await ask(
                client, prompt, model=model, max_tokens=max_tokens, stream=i % 2 == 1,
                enforce=enforce,
            )  # fmt: skip
            done()
            return answer

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(i, p)) for i, p in enumerate(prompts)]
    return [task.result() for task in tasks]


async def ask(
    client: AsyncOpenAI,
    prompt: Mapping[str, Any],
    *,
    model: str,
    max_tokens: int,
    stream: bool,
    enforce: str | None,
) -> Answer:
    """Send one prompt at temperature 0."""
    started = time.monotonic()
    extra: dict[str, Any] = {"return_token_ids": True}
    if enforce is not None:
        extra["vllm_xargs"] = {"saeguard_enforce": enforce}
    options: dict[str, Any] = {
        "model": model,
        "messages": list(prompt["prompt"]),
        "temperature": 0,
        "seed": SEED,
        "max_tokens": max_tokens,
        "extra_body": extra,
    }
    if stream:
        got = await _streamed(client, options, started)
    else:
        response = await client.chat.completions.create(**options)
        choice = response.choices[0]
        got = {
            "text": choice.message.content or "",
            "prompt_ids": tuple(response.model_extra["prompt_token_ids"]),
            "token_ids": tuple(choice.model_extra["token_ids"]),
            "finish": choice.finish_reason,
            "response_id": response.id,
            "said": response.model_extra.get("saeguard"),
        }
    if not got["said"]:
        raise NotGuardedError(f"{prompt['id']}: the response has no `saeguard` object")
    return Answer(
        id=prompt["id"],
        behaviour=prompt["behaviour"],
        messages=tuple(prompt["prompt"]),
        streamed=stream,
        seconds=time.monotonic() - started,
        enforced=enforce,
        **got,
    )


async def _streamed(
    client: AsyncOpenAI, options: Mapping[str, Any], started: float
) -> dict[str, Any]:
    """Collect a stream; the verdict is part of the chunk that carries the finish reason."""
    got: dict[str, Any] = {"text": "", "prompt_ids": (), "token_ids": (), "said": None}
    got["arrived"] = ()
    async for chunk in await client.chat.completions.create(**options, stream=True):
        extra = chunk.model_extra or {}
        got["response_id"] = chunk.id
        got["prompt_ids"] = tuple(extra.get("prompt_token_ids") or got["prompt_ids"])
        got["said"] = extra.get("saeguard") or got["said"]
        for choice in chunk.choices:
            got["text"] += choice.delta.content or ""
            ids = tuple((choice.model_extra or {}).get("token_ids") or ())
            got["token_ids"] += ids
            got["arrived"] += (time.monotonic() - started,) * len(ids)
            got["finish"] = choice.finish_reason or got.get("finish")
    return got
