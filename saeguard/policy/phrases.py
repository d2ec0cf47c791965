"""Parse the short phrases of a policy.

`for: 3 of 8 tokens`, `for: 20 tokens in the request`, `for: the last token`, `keep: 16 tokens`,
`sample: 10%`, and of a selection `over: mean of 16 tokens`, `over: mean of the request`,
`over: average with half-life 8 tokens`.
"""

from __future__ import annotations

import re

from saeguard.policy.types import Aggregate, Over, Window

MAX_WINDOW = 64
MAX_KEEP = 4096

LAST = "the last token"
WHOLE = "mean of the request"
WINDOW = rf"([1-9][0-9]?( of [1-9][0-9]? tokens?| tokens? in the request)|{LAST})"
OVER = (
    r"((mean|max) of [1-9][0-9]? tokens?|average with half-life [1-9][0-9]? tokens?"
    r"|(mean|max) of the request)"
)
SAMPLE = r"(100|[1-9]?[0-9])(\.[0-9]{1,4})?%"
KEEP = r"(0|[1-9][0-9]{0,3})( tokens?)?"


def window(text: str) -> Window:
    """Read `k of n tokens`, `k tokens in the request`, or `the last token`.

    Raises:
        ValueError: the message describes the expected form.
    """
    if not re.fullmatch(WINDOW, text):
        raise ValueError(f'write it as "3 of 8 tokens", "20 tokens in the request" or "{LAST}"')
    if text == LAST:
        return Window(last=True)
    k, *rest = map(int, re.findall("[0-9]+", text))
    n = rest[0] if rest else None
    _at_most_a_window(n or k)
    if n is None:
        return Window(k, None)
    if k > n:
        raise ValueError(f"{k} of {n} can never be reached; write the smaller number first")
    return Window(k, n)


def over(text: str) -> Over:
    """Read `mean of 16 tokens` and its like.

    Raises:
        ValueError: the message describes the expected form.
    """
    if not re.fullmatch(OVER, text):
        raise ValueError(
            'write "mean of 16 tokens", "max of 16 tokens", "average with half-life 8 tokens", '
            '"max of the request" or "mean of the request"'
        )
    numbers = re.findall("[0-9]+", text)
    if not numbers:
        return Over("peak" if text.startswith("max") else "whole")
    n = int(numbers[0])
    _at_most_a_window(n)
    kinds: dict[str, Aggregate] = {"mean": "mean", "max": "max", "average": "average"}
    return Over(kinds[text.split(" ", 1)[0]], n)


def sample(text: str) -> float:
    """Read `10%` as a share of requests.

    Raises:
        ValueError: the message describes the expected form.
    """
    share = float(text[:-1]) / 100 if re.fullmatch(SAMPLE, text) else 0.0
    if not 0 < share <= 1:
        raise ValueError('write a percentage above 0% and up to 100%, such as "10%" or "0.5%"')
    return share


def _at_most_a_window(n: int) -> None:
    if n > MAX_WINDOW:
        raise ValueError(f"at most {MAX_WINDOW} tokens can be asked for here, this is {n}")


def keep(value: str | int) -> int:
    """Read `16` or `16 tokens`.

    Raises:
        ValueError: the message describes the expected form.
    """
    found = re.fullmatch(KEEP, str(value))
    if not found or int(found[1]) > MAX_KEEP:
        raise ValueError(f'write a number of tokens from 0 to {MAX_KEEP}, such as "16 tokens"')
    return int(found[1])
