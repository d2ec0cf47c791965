"""Add the `saeguard` object to response bodies, and replace stopped texts by a policy's message.

Bodies may carry extra fields, which the unmodified OpenAI client keeps in `model_extra`:
`response.saeguard["flagged"]`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from saeguard.policy.types import strongest_action
from saeguard.vllm.attributes import CHOICE_VERDICTS
from saeguard.vllm.messages import KEY, MESSAGE

DATA = "data: "
"""Prefix of a server-sent chunk."""

ByChoice: TypeAlias = dict[int, Mapping[str, Any]]
"""By choice index: the `saeguard` object that the engine core made for it."""


def collect(found: ByChoice, output: Any, offset: int = 0) -> None:
    """Collect the verdicts of the choices that a `RequestOutput` finishes.

    Args:
        found: the verdicts by choice, which are added to.
        output: of one request.
        offset: index of the request's first choice in the response.
    """
    for completion in output.outputs:
        verdicts = CHOICE_VERDICTS.get(completion)
        if verdicts is not None:
            found[offset + completion.index] = verdicts


def summarise(found: Iterable[tuple[int, Mapping[str, Any]]]) -> dict[str, Any] | None:
    """Return one `saeguard` object for a response's choices, None if there are no verdicts.

    If the response has several choices, each verdict names its own.

    Args:
        found: (choice index, its `saeguard` object).
    """
    parts = sorted(found, key=lambda part: part[0])
    if not parts:
        return None
    if len(parts) == 1:
        return dict(parts[0][1])
    return {
        **{key: value for key, value in parts[0][1].items() if key != MESSAGE},
        "flagged": _any(p["flagged"] for _, p in parts),
        "action": strongest_action(p["action"] for _, p in parts),
        "verdicts": [{"choice": i, **v} for i, p in parts for v in p["verdicts"]],
        "coverage": [{"choice": i, **p["coverage"]} for i, p in parts],
        "errors": sum(p["errors"] for _, p in parts),
        "not_evaluated": sum(p["not_evaluated"] for _, p in parts),
        "request_id": [p["request_id"] for _, p in parts],
    }


def _any(flagged: Iterable[bool | None]) -> bool | None:
    """Return whether a choice is flagged; None if none is and one of them was not judged."""
    found = set(flagged)
    return True if True in found else None if None in found else False


def replace_texts(choices: Iterable[Any], found: Mapping[int, Mapping[str, Any]]) -> None:
    """Replace the text of each choice that a policy stopped by the policy's message.

    Everything else that repeats the text is removed: reasoning, tool calls, token ids,
    probabilities.
    """
    for choice in choices:
        text = found.get(choice.index, {}).get(MESSAGE)
        if text is None:
            continue
        message = getattr(choice, "message", None)
        for part, names in (
            (choice, ("logprobs", "token_ids", "prompt_logprobs")),
            (message, ("reasoning", "reasoning_content", "function_call")),
        ):
            for name in names:
                if getattr(part, name, None) is not None:
                    setattr(part, name, None)
        if message is None:
            choice.text = text
        else:
            message.content = text
            if getattr(message, "tool_calls", None):
                message.tool_calls = []


def annotate(line: str, found: Mapping[int, Mapping[str, Any]]) -> str:
    """Add the verdicts to a server-sent chunk that finishes a choice; return others unchanged.

    A policy's message is the last piece of the text, since the client has received the others.
    """
    if not found or not line.startswith(DATA) or '"finish_reason":"' not in line.replace(": ", ":"):
        return line
    chunk = json.loads(line[len(DATA) :])
    done = [c["index"] for c in chunk.get("choices", ()) if c.get("finish_reason")]
    summary = summarise((i, found[i]) for i in done if i in found)
    if summary is None:
        return line
    for choice in chunk["choices"]:
        text = found.get(choice["index"], {}).get(MESSAGE)
        if text is not None and choice.get("finish_reason"):
            for name in ("logprobs", "token_ids"):
                choice.pop(name, None)
            if "delta" in choice:
                choice["delta"] = {"content": text}
            else:
                choice["text"] = text
    return f"{DATA}{json.dumps({**chunk, KEY: summary}, separators=(',', ':'))}\n\n"
