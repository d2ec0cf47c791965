"""Random requests to a vLLM server as a hostile client would write them, seeded."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

WORDS = (
    "hello",
    "write",
    "a",
    "poem",
    "SELECT",
    "rm -rf",
    "ignore all that",
    "\u202eabc",
    "é",
    "🙂",
)
"""Prompts are made of these; none holds a word that the model emits."""
TOOL = {
    "type": "function",
    "function": {
        "name": "run",
        "description": "Run a command.",
        "parameters": {"type": "object", "properties": {"command": {"type": "string"}}},
    },
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}


@dataclass(frozen=True)
class Ask:
    """One HTTP request."""

    path: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    method: str = "POST"
    choices: int = 1
    """How many answers it asks for, over all its prompts."""
    stream: bool = False
    leaves: int | None = None
    """The client disconnects after so many bytes of the answer; None if it reads all."""


def ask(rng: random.Random, n: int) -> Ask:
    """Return the request number `n`."""
    route = rng.choices(list(ROUTES), [weight for weight, _ in ROUTES.values()])[0]
    made = ROUTES[route][1](rng)
    body, choices = made
    if rng.random() < 0.97:
        body["model"] = "tiny"
    stream = bool(body.get("stream"))
    if rng.random() < 0.05:
        _spoil(rng, body)
    content = json.dumps(body, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if rng.random() < 0.02:
        content = content[: rng.randrange(len(content))]
    leaves = rng.randrange(400) if rng.random() < 0.08 else None
    headers = {"content-type": "application/json", "x-request-id": f"hostile-{n}-"}
    return Ask(route, content, headers, choices=choices, stream=stream, leaves=leaves)


def _text(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))


def _sampling(rng: random.Random) -> dict[str, Any]:
    """Return options that every generating route takes, each with some probability."""
    offers: dict[str, Callable[[], Any]] = {
        "temperature": lambda: rng.choice([0, 0.7, 1.0, 2.0, -1, 1e9]),
        "top_p": lambda: rng.choice([0.1, 0.9, 1.0, 0.0, 1.5]),
        "top_k": lambda: rng.choice([-1, 0, 1, 40, 10**9]),
        "min_p": lambda: rng.choice([0.0, 0.2]),
        "seed": lambda: rng.choice([0, 1, 2**31]),
        "stop": lambda: rng.choice(["Z", ["q0", "Z"], "", ["x"] * 40]),
        "stop_token_ids": lambda: rng.choice([[300], [0, 1, 2], [-1], [10**6]]),
        "min_tokens": lambda: rng.choice([0, 2, 8, 100]),
        "ignore_eos": lambda: True,
        "include_stop_str_in_output": lambda: True,
        "skip_special_tokens": lambda: False,
        "spaces_between_special_tokens": lambda: False,
        "presence_penalty": lambda: rng.choice([-2, 2, 9]),
        "repetition_penalty": lambda: rng.choice([0.5, 1.2, 0]),
        "logit_bias": lambda: rng.choice([{"300": 100}, {"2": 100}, {"x": 1}, {"999999": 1}]),
        "allowed_token_ids": lambda: rng.choice([[300, 301], [], [2], [10**6]]),
        "bad_words": lambda: rng.choice([["Zq001Z"], [""], ["hello"]]),
        "detokenize": lambda: False,
        "return_token_ids": lambda: True,
        "return_tokens_as_token_ids": lambda: True,
        "truncate_prompt_tokens": lambda: rng.choice([1, 4, -1, 10**9]),
        "cache_salt": lambda: rng.choice(["a", "", "x" * 500]),
        "priority": lambda: rng.choice([0, 1]),
        "vllm_xargs": lambda: rng.choice(
            [{"saeguard_enforce": "test.quiet"}, {"saeguard_enforce": "test.stop"},
             {"saeguard_tenant": "root"}, {"saeguard": "off"}, {"saeguard_off": 1}, {"x": [1, 2]}]
        ),
        "kv_transfer_params": lambda: rng.choice([{"saeguard": {}}, {"do_remote_decode": True}]),
        "structured_outputs": lambda: rng.choice(
            [{"regex": "Zq[0-9]{3}Z"}, {"choice": ["Zq001Z", "Zq002Z"]}, {"json": SCHEMA}]
        ),
    }  # fmt: skip
    picked = rng.sample(sorted(offers), k=rng.choice([0, 0, 1, 2, 3, 5]))
    return {name: offers[name]() for name in picked}


def _stream(rng: random.Random) -> dict[str, Any]:
    out: dict[str, Any] = {"stream": True} if rng.random() < 0.4 else {}
    if out and rng.random() < 0.4:
        more = {"continuous_usage_stats": True} if rng.random() < 0.5 else {}
        out["stream_options"] = {"include_usage": True, **more}
    return out


def _choices(rng: random.Random) -> dict[str, Any]:
    return {"n": rng.choice([2, 3])} if rng.random() < 0.2 else {}


def _chat(rng: random.Random) -> tuple[dict[str, Any], int]:
    roles = rng.choices(
        ["user", "assistant", "system", "tool", "developer"], [6, 2, 1, 1, 0.2], k=3
    )
    messages = [{"role": role, "content": _text(rng)} for role in roles[: rng.randint(1, 3)]]
    body: dict[str, Any] = {"messages": messages, **_sampling(rng), **_stream(rng), **_choices(rng)}
    if rng.random() < 0.9:
        body[rng.choice(["max_tokens", "max_completion_tokens"])] = rng.choice([1, 2, 5, 12, 0])
    if rng.random() < 0.2:
        body |= {"logprobs": True, "top_logprobs": rng.choice([0, 1, 5, 99])}
    if rng.random() < 0.1:
        body["prompt_logprobs"] = 2
    if rng.random() < 0.15:
        body["tools"] = [TOOL]
        named = {"type": "function", "function": {"name": "run"}}
        body["tool_choice"] = rng.choice(["auto", "required", "none", named])
    if rng.random() < 0.1:
        schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
        body["response_format"] = rng.choice([{"type": "json_object"}, schema])
    if rng.random() < 0.1:
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    if rng.random() < 0.08:
        body |= {"use_beam_search": True, "n": 2}
    if rng.random() < 0.05:
        body["echo"] = True
    return body, int(body.get("n", 1))


def _completion(rng: random.Random) -> tuple[dict[str, Any], int]:
    ids = [rng.choice([1, 5, 40, 250, 0]) for _ in range(rng.randint(1, 9))]
    prompt = rng.choice(
        [_text(rng), [_text(rng), _text(rng)], ids, [ids, ids], "", [], [-5], [10**7]]
    )
    body: dict[str, Any] = {"prompt": prompt, **_sampling(rng), **_stream(rng), **_choices(rng)}
    if rng.random() < 0.9:
        body["max_tokens"] = rng.choice([1, 2, 5, 12, 0])
    for name, value in (("echo", True), ("logprobs", 3), ("suffix", "end"), ("prompt_logprobs", 1)):
        body |= {name: value} if rng.random() < 0.08 else {}
    if rng.random() < 0.08:
        body |= {"use_beam_search": True, "n": 2}
    several = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
    return body, int(body.get("n", 1)) * (len(prompt) if several else 1)


def _responses(rng: random.Random) -> tuple[dict[str, Any], int]:
    body: dict[str, Any] = {"input": _text(rng), **_stream(rng)}
    if rng.random() < 0.9:
        body["max_output_tokens"] = rng.choice([1, 5, 12])
    for name, value in (
        ("instructions", _text(rng)),
        ("background", True),
        ("store", True),
        ("temperature", 0),
        ("include", ["message.output_text.logprobs"]),
        ("previous_response_id", "resp_nothing"),
    ):
        body |= {name: value} if rng.random() < 0.1 else {}
    body.pop("stream_options", None)
    return body, 1


def _messages(rng: random.Random) -> tuple[dict[str, Any], int]:
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": _text(rng)}],
        "max_tokens": rng.choice([1, 5, 12]),
        **({"stream": True} if rng.random() < 0.4 else {}),
    }
    if rng.random() < 0.2:
        body["stop_sequences"] = ["Z"]
    if rng.random() < 0.2:
        body["system"] = _text(rng)
    return body, 1


def _batch(rng: random.Random) -> tuple[dict[str, Any], int]:
    body, _ = _chat(rng)
    n = rng.randint(1, 3)
    body["messages"] = [[{"role": "user", "content": _text(rng)}] for _ in range(n)]
    return body, n * int(body.get("n", 1))


def _invocations(rng: random.Random) -> tuple[dict[str, Any], int]:
    return rng.choice([_chat, _completion])(rng)


def _cohere(rng: random.Random) -> tuple[dict[str, Any], int]:
    body, _ = _messages(rng)
    body.pop("stop_sequences", None)
    body.pop("system", None)
    return body, 1


def _other(rng: random.Random) -> tuple[dict[str, Any], int]:
    return {"input": _text(rng), "prompt": _text(rng), "messages": []}, 1


ROUTES: dict[str, tuple[float, Callable[[random.Random], tuple[dict[str, Any], int]]]] = {
    "/v1/chat/completions": (8, _chat),
    "/v1/completions": (6, _completion),
    "/v1/responses": (2, _responses),
    "/v1/messages": (2, _messages),
    "/v1/chat/completions/batch": (1, _batch),
    "/invocations": (1, _invocations),
    "/v2/chat": (0.5, _cohere),
    "/v1/embeddings": (0.1, _other),
    "/pooling": (0.1, _other),
    "/v1/score": (0.1, _other),
    "/generative_scoring": (0.1, _other),
    "/tokenize": (0.1, _other),
}
"""Weight and body of each route."""


def _spoil(rng: random.Random, body: dict[str, Any]) -> None:
    """Give one field of a body a value of another type or size."""
    values = [None, -1, 1e308, float("nan"), "\ud800", "\0", [], {}, True, "x" * 5000, [[[]]]]
    body[rng.choice(sorted(body))] = rng.choice(values)
