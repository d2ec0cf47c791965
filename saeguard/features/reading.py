"""How the values of a text's tokens become the one number by which the text is judged.

Search, calibration and the policies that they write use the same readings, so that a rate that was
measured is the rate in serving.
"""

from __future__ import annotations

import re
from typing import NamedTuple

LAST = "the last token"
MEAN = "mean of the request"


class Reading(NamedTuple):
    """What a policy writes as `for` and `over`."""

    k: int = 1
    n: int = 1
    """The k-th largest of the last `n` tokens, at its highest: `for: k of n tokens`."""
    last: bool = False
    """The value at the last token in scope: `for: the last token`."""
    mean: bool = False
    """The mean of all tokens in scope: `over: mean of the request`, at the last token."""

    @property
    def words(self) -> str:
        """The reading as evidence spells it."""
        if self.last:
            return f"{MEAN}, {LAST}" if self.mean else LAST
        return f"{self.k} of {self.n}"

    @property
    def window(self) -> str:
        """What the policy writes as `for`."""
        return LAST if self.last else f"{self.k} of {self.n} tokens"

    @property
    def over(self) -> str:
        """What each selection writes as `over`; empty for the token's own share."""
        return MEAN if self.mean else ""


PEAK = Reading()
"""The strongest token."""
READINGS = (PEAK, Reading(last=True, mean=True), Reading(last=True))
"""What a search compares. The strongest token comes first: only it can stop or clamp."""


def read_words(words: str) -> Reading:
    """Return the reading that evidence spells.

    Raises:
        ValueError: it spells none.
    """
    for reading in READINGS:
        if reading.words == words:
            return reading
    found = re.fullmatch(r"(\d+) of (\d+)", words)
    if not found:
        raise ValueError(f'expected "3 of 8", "{LAST}" or "{MEAN}, {LAST}", got {words!r}')
    return Reading(int(found[1]), int(found[2]))
