"""The short phrases of a policy: `for: 3 of 8 tokens` and `keep: 16 tokens`."""

from __future__ import annotations

import re

from saeguard.policy.types import Window

MAX_WINDOW = 64
MAX_KEEP = 4096

WINDOW = r"[1-9][0-9]? of [1-9][0-9]? tokens?"
KEEP = r"(0|[1-9][0-9]{0,3})( tokens?)?"


def window(text: str) -> Window:
    """Read `k of n tokens`.

    Raises:
        ValueError: says what is allowed.
    """
    if not re.fullmatch(WINDOW, text):
        raise ValueError('write it as "3 of 8 tokens"')
    k, n = map(int, re.findall("[0-9]+", text))
    if n > MAX_WINDOW:
        raise ValueError(f"a window has at most {MAX_WINDOW} tokens, this one has {n}")
    if k > n:
        raise ValueError(f"{k} of {n} can never be reached; the first number is the smaller one")
    return Window(k, n)


def keep(value: str | int) -> int:
    """Read `16` or `16 tokens`.

    Raises:
        ValueError: says what is allowed.
    """
    found = re.fullmatch(KEEP, str(value))
    if not found or int(found[1]) > MAX_KEEP:
        raise ValueError(f'write a number of tokens from 0 to {MAX_KEEP}, such as "16 tokens"')
    return int(found[1])
