"""Traces of feature shares, written as `0x4 0.9x3 0`: value, times, how many tokens."""

from __future__ import annotations

import re

from saeguard.errors import InputError

MAX_TOKENS = 10_000

_RUN = re.compile(r"(-?(?:0|[1-9][0-9]{0,3})(?:\.[0-9]{1,12})?)(?:x([1-9][0-9]{0,4}))?")


class TraceError(InputError):
    """A mistake in a trace.

    Attributes:
        offset: of the mistake in the text, in characters.
    """

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.offset = offset


def trace(text: str) -> list[float]:
    """Return one share per token.

    Raises:
        TraceError: the first mistake.
    """
    shares: list[float] = []
    for word in re.finditer(r"\S+", text):
        run = _RUN.fullmatch(word.group())
        if not run:
            message = f'found "{word.group()[:40]}"; write a share, or share x tokens: 0.9 or 0.9x3'
            raise TraceError(message, word.start())
        times = int(run[2] or 1)
        if len(shares) + times > MAX_TOKENS:
            raise TraceError(f"a trace has at most {MAX_TOKENS:,} tokens", word.start())
        shares += [float(run[1])] * times
    if not shares:
        raise TraceError("a trace has at least one token", 0)
    return shares
