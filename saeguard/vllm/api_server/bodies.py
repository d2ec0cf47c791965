"""Patch of the HTTP application: what was found goes into every answer, whatever its route.

Handlers and vLLM's formats stay as they are. The `saeguard` object is put into the finished JSON
body, or into the server-sent event that finishes a choice, and the headers say what was found. A
body that is stopped is corrected where its format has no word for that, or has one of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

from saeguard.vllm.api_server.tenants import KEY, key_of
from saeguard.vllm.api_server.told import TOLD, Told
from saeguard.vllm.messages import KEY as NAME
from saeguard.vllm.patches import Original, assumes, patch

Send: TypeAlias = Callable[[dict[str, Any]], Awaitable[None]]

JSON, EVENTS = b"application/json", b"text/event-stream"
DATA = b"data: "
"""Prefix of the data of a server-sent event."""
FINISHES = re.compile(
    rb'"finish_reason": ?"|"type": ?"(?:message_delta|message-end|response\.completed)"'
)
"""In a server-sent event that finishes a choice: OpenAI's and vLLM's, Anthropic's, Cohere's,
Responses'."""

CUT = {"response.function_call_arguments.done", "response.custom_tool_call_input.done"}
"""Events that tell a client that a call is complete."""

assumes(
    "each server-sent event is one message of the ASGI application",
    why="the `saeguard` object is put into the event that finishes a choice",
)


@patch(
    "starlette.applications:Starlette.__call__",
    why="the API key of an HTTP request, and what its answer tells",
)
async def call(original: Original, _app: Any, scope: Any, send: Any) -> Any:
    """Open the record of an HTTP request, handle the request, and tell what was found."""
    told = Told()
    key, record = KEY.set(key_of(scope.get("headers", ()))), TOLD.set(told)
    try:
        if scope.get("type") != "http":
            return await original()
        return await original(send=Teller(told, send))
    finally:
        KEY.reset(key)
        TOLD.reset(record)


class Teller:
    """Sends an answer's messages on, with what was found in them."""

    def __init__(self, told: Told, send: Send) -> None:
        """Tell `told` in the messages that are passed to `send`."""
        self._told = told
        self._send = send
        self._start: dict[str, Any] | None = None
        """The start of a JSON body, until the body is complete."""
        self._body = bytearray()
        self._events = False

    async def __call__(self, message: dict[str, Any]) -> None:
        """Send one message of an ASGI application."""
        kind = message["type"]
        if kind == "http.response.start":
            headers = {name.lower(): value for name, value in message.get("headers", ())}
            media = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            plain = b"content-encoding" not in headers
            self._events = plain and media == EVENTS
            if self._told.verdicts and media != EVENTS:
                message = {
                    **message,
                    "headers": [*message.get("headers", ()), *self._told.headers()],
                }
                if plain and media == JSON:
                    self._start = message
                    return
        elif kind == "http.response.body" and self._start is not None:
            self._body += message.get("body", b"")
            if message.get("more_body", False):
                return
            start, self._start = self._start, None
            body = body_with(bytes(self._body), self._told)
            others = [h for h in start["headers"] if h[0].lower() != b"content-length"]
            length = (b"content-length", str(len(body)).encode())
            await self._send({**start, "headers": [*others, length]})
            message = {**message, "body": body}
        elif kind == "http.response.body" and self._events:
            event = message.get("body", b"")
            if self._told.flags:
                message = {**message, "body": (event := flagged(event, self._told))}
            if self._told.verdicts or event.startswith(b"event: response.completed"):
                message = {**message, "body": event_with(event, self._told)}
        await self._send(message)


def body_with(body: bytes, told: Told) -> bytes:
    """Return a JSON body with the `saeguard` object; other bodies as they are."""
    if told.stops and not told.embedded:
        found = _object(body)
        return body if found is None else _dump(_corrected(found, told) | {NAME: told.summary()})
    text = body.strip()
    if told.embedded or not (text.startswith(b"{") and text.endswith(b"}")):
        return body
    comma = b"," if text[1:-1].strip() else b""
    return b"%s%s%s}" % (text[:-1], comma, _dump({NAME: told.summary()})[1:-1])


def flagged(event: bytes, told: Told) -> bytes:
    """Return a server-sent event with the flags that were not sent yet; others unchanged."""
    text = event.rstrip()
    before, _, data = text.partition(DATA)
    if not (data.startswith(b"{") and data.endswith(b"}")):
        return event
    flags = _dump({NAME: told.take_flags()})[1:-1]
    return b"%s%s%s,%s}\n\n" % (before, DATA, data[:-1], flags)


def event_with(event: bytes, told: Told) -> bytes:
    """Return a server-sent event with what was found if it finishes a choice; others unchanged.

    A call that a stop cut short is never told to be complete.
    """
    finishes = FINISHES.search(event) is not None
    if not (finishes or (told.stops and (b'"usage"' in event or b"_call" in event))):
        return event
    before, mark, data = event.partition(DATA)
    found = _object(data) if mark else None
    if found is None:
        return event
    kind = str(found.get("type", ""))
    if kind.startswith("response."):
        return _responses_event(event, kind, found, told)
    if told.stops:
        found = _corrected(found, told)
    choices = found.get("choices")
    done = None
    if isinstance(choices, list):
        done = [c["index"] for c in choices if c.get("finish_reason")]
    summary = told.summary(done) if finishes else None
    if summary is not None:
        found[NAME] = summary
    return b"%s%s%s\n\n" % (before, mark, _dump(found))


def _responses_event(event: bytes, kind: str, found: dict[str, Any], told: Told) -> bytes:
    """Return an event of the Responses API, whose last one holds the body itself."""
    if kind == "response.completed" and _content_filtered(found):
        kind = found["type"] = "response.incomplete"
    elif kind in CUT and told.stops:
        return b""
    elif kind == "response.output_item.done" and told.stops:
        found["item"]["status"] = "incomplete"
    else:
        return event
    return b"event: %s\n%s%s\n\n" % (kind.encode(), DATA, _dump(found))


def _content_filtered(event: dict[str, Any]) -> bool:
    details = event.get("response", {}).get("incomplete_details") or {}
    return bool(details.get("reason") == "content_filter")


def _corrected(body: dict[str, Any], told: Told) -> dict[str, Any]:
    """Return a stopped body whose usage counts what was withheld, and whose end says so."""
    usage = body.get("usage")
    if isinstance(usage, dict) and not told.embedded:
        usage |= told.counted(usage)
    end = body.get("delta") if body.get("type") in {"message_delta", "message-end"} else body
    if isinstance(end, dict):
        if body.get("type") in {"message", "message_delta"}:  # Anthropic's
            end |= {"stop_reason": "refusal", "stop_sequence": None}
        elif "finish_reason" in end:  # Cohere's, which has no word for it
            end["finish_reason"] = "ERROR"
    return body


def _object(data: bytes) -> dict[str, Any] | None:
    """Return the JSON object that `data` holds, None if it holds something else."""
    try:
        found = json.loads(data)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
