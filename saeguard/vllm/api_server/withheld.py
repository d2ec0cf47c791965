"""The text of an answer that a policy stopped: it says so to whoever parses it."""

from __future__ import annotations

from typing import Self


class Stopped(str):
    """Text of an answer that a policy stopped: what is kept of it, or the policy's message.

    Routes pass texts on to parsers of reasoning and tool calls. The type tells them that no call
    of this answer is to be made, and that a message is content and nothing else.
    """

    __slots__ = ("is_message", "tokens")
    is_message: bool
    """Whether it is a policy's message, in place of what was written."""
    tokens: int
    """Number of generated tokens that the message replaces."""

    def __new__(cls, text: str, *, is_message: bool = False, tokens: int = 0) -> Self:
        """Mark a text."""
        self = super().__new__(cls, text)
        self.is_message, self.tokens = is_message, tokens
        return self

    def __bool__(self) -> bool:
        """Return true also for an empty text: a stream that skips empty pieces must end with it."""
        return True
