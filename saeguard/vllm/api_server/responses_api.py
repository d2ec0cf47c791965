"""Patch of the Responses API: an answer that a policy stopped is incomplete, and says why.

Its bodies are kept, and read again by another HTTP request: the `saeguard` object is part of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from uuid import uuid4

from saeguard.vllm.api_server.outputs import FINISH
from saeguard.vllm.api_server.told import TOLD, Told
from saeguard.vllm.messages import KEY
from saeguard.vllm.patches import Original, patch, reads

PROTOCOL = "vllm.entrypoints.openai.responses.protocol"
UNDER_WAY = {"queued", "in_progress"}
CALLS = {"function_call", "custom_tool_call"}
"""Types of output items that a client executes."""

reads(
    f"{PROTOCOL}:ResponsesResponse",
    "incomplete_details",
    why="why the answer is incomplete",
)
reads("openai.types.responses:ResponseOutputMessage", why="a policy's message as an output item")
reads("openai.types.responses:ResponseOutputText", why="a policy's message as an output item")


@patch(
    f"{PROTOCOL}:ResponsesResponse.from_request",
    why="the `saeguard` object of a body that is kept, and the status of a stopped answer",
)
def from_request(original: Original, _cls: Any, output: Any, status: Any, usage: Any) -> Any:
    """Build a body of the Responses API with what was found."""
    told = TOLD.get()
    if told is None or not told.verdicts or status in UNDER_WAY:
        return original()
    if told.stops:
        if usage is not None:
            usage = usage.model_copy(update=told.counted(usage.model_dump()))
        body = original(output=_kept(output, told), status="incomplete", usage=usage)
        body.incomplete_details.reason = FINISH
    else:
        body = original()
    setattr(body, KEY, told.summary())
    told.embedded = True
    return body


def _kept(items: Iterable[Any], told: Told) -> list[Any]:
    """Return a stopped answer's output items without tool calls, with the policies' messages."""
    kept = [item for item in items if item.type not in CALLS]
    texts = "\n".join(
        str(getattr(part, "text", ""))
        for item in kept
        for part in getattr(item, "content", None) or ()
    )
    messages = [text.strip() for text in told.stops.values() if text.is_message]
    return [*kept, *(_message(text) for text in messages if text not in texts)]


def _message(text: str) -> Any:
    from openai.types.responses import ResponseOutputMessage, ResponseOutputText

    return ResponseOutputMessage(
        id=f"msg_{uuid4().hex}",
        content=[ResponseOutputText(text=text, annotations=[], type="output_text")],
        role="assistant",
        status="completed",
        type="message",
    )
