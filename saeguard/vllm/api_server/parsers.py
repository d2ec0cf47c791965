"""Patches of vLLM's parsers of reasoning and tool calls: none sees a policy's message as output.

Every route that knows tool calls parses texts with the class that `ParserManager.get_parser`
returns. A message is content, whatever state the parser is in, and an answer that a policy stopped
has no tool calls: one that was cut could be executed half.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from saeguard.vllm.api_server.told import TOLD
from saeguard.vllm.api_server.withheld import Stopped
from saeguard.vllm.patches import Original, calls, patch, reads

CONTEXT = "vllm.entrypoints.openai.responses.context"
PARSER = "vllm.parser.abstract_parser:Parser"

calls(f"{PARSER}.parse", "model_output", why="a stopped answer has no tool calls")
calls(f"{PARSER}.parse_delta", "delta_text", why="a stopped answer has no tool calls")
reads(
    "vllm.parser.abstract_parser:DeltaMessage",
    "content",
    "tool_calls",
    why="a message as the last piece of a stream",
)


class _Aware:
    """Mixed into a class of parsers, before it."""

    _content_sent = False
    """Whether a stream has sent content, from which a message needs to be set apart."""
    _held: tuple[Any, ...] | list[Any] = ()
    """Pieces of tool calls that a stream keeps back until its answer has ended."""

    def parse(self, model_output: str, *args: Any, **kwargs: Any) -> Any:
        """Return (reasoning, content, tool calls) of a complete text."""
        if not isinstance(model_output, Stopped):
            return super().parse(model_output, *args, **kwargs)  # type: ignore[misc]
        if model_output.is_message:
            return None, str(model_output), []
        reasoning, content, _ = super().parse(model_output, *args, **kwargs)  # type: ignore[misc]
        return reasoning, content, []

    def parse_delta(self, delta_text: str, *args: Any, **kwargs: Any) -> Any:
        """Return the message of one piece of a stream, None if there is nothing to send."""
        if isinstance(delta_text, Stopped) and delta_text.is_message:
            from vllm.parser.abstract_parser import DeltaMessage

            text = str(delta_text)
            return DeltaMessage(content=text if self._content_sent else text.lstrip())
        delta = super().parse_delta(delta_text, *args, **kwargs)  # type: ignore[misc]
        told = TOLD.get()
        if told is not None and told.holds_tool_calls:
            delta = self._without_calls(delta, finished=kwargs["finished"])
        if delta is not None:
            self._content_sent = self._content_sent or bool(delta.content)
            if isinstance(delta_text, Stopped):
                delta.tool_calls = []
        return delta

    def _without_calls(self, delta: Any, *, finished: bool) -> Any:
        """Keep the pieces of tool calls back until the answer has ended; then return them all."""
        self._held = [*self._held, *(() if delta is None else delta.tool_calls)]
        calls = whole_calls(self._held) if finished else []
        if delta is None and calls:
            from vllm.parser.abstract_parser import DeltaMessage

            delta = DeltaMessage()
        if delta is not None:
            delta.tool_calls = calls
            if not (calls or delta.content or delta.reasoning):
                return None
        return delta


def whole_calls(pieces: Iterable[Any]) -> list[Any]:
    """Return tool calls, each in one piece: its first piece with the arguments of all."""
    calls: dict[int, Any] = {}
    for piece in pieces:
        call = calls.get(piece.index)
        if call is None:
            calls[piece.index] = piece
        elif piece.function is not None and piece.function.arguments:
            more = piece.function.arguments
            call.function.arguments = (call.function.arguments or "") + more
    return list(calls.values())


@patch(
    "vllm.parser.parser_manager:ParserManager.get_parser",
    why="a policy's message is content, and a stopped answer has no tool calls",
)
def get_parser(original: Original, _manager: Any) -> Any:
    """Return vLLM's class of parsers, aware of answers that a policy stopped."""
    found = original()
    if found is None or issubclass(found, _Aware):
        return found
    return type(found.__name__, (_Aware, found), {})


@patch(
    f"{CONTEXT}:ParsableContext.need_builtin_tool_call",
    f"{CONTEXT}:HarmonyContext.need_builtin_tool_call",
    why="the server itself calls no tool for an answer that a policy stopped",
)
def need_builtin_tool_call(original: Original, _context: Any) -> bool:
    """Return whether the server must call a tool: never for an answer that a policy stopped."""
    told = TOLD.get()
    return bool(original()) and not (told is not None and told.stops)
