"""The tiny template language all corpus texts are written in.

``[[a|b|c]]`` picks one of the alternatives, ``$name`` is replaced by a value of the slot *name*.
A slot keeps its value within one document.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

_CHOICE = re.compile(r"\[\[((?:(?!\[\[|\]\]).)*)\]\]", re.DOTALL)
_SLOT = re.compile(r"\$([a-z_]+)")

Message = dict[str, str]
T = TypeVar("T")


@dataclass(frozen=True)
class Dialogue:
    """One conversation and what is known about its last assistant turn."""

    messages: tuple[Message, ...]
    behaviour: str  # unsafe_code, deception, sycophancy or benign
    kind: str
    template: str
    label: int
    style: str = "neutral"  # what the context asks for: bad, good or neutral

    @property
    def prompt(self) -> list[Message]:
        """Every message before the last assistant turn."""
        return list(self.messages[:-1])

    @property
    def completion(self) -> str:
        """The last assistant turn."""
        return self.messages[-1]["content"]


def expand(rng: random.Random, text: str, slots: Mapping[str, Sequence[str] | str]) -> str:
    """Fill alternatives and slots of *text*; one slot has one value throughout."""
    chosen: dict[str, str] = {}

    def slot(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in chosen:
            value = slots[name]
            chosen[name] = value if isinstance(value, str) else rng.choice(value)
        return chosen[name]

    while True:
        new = _CHOICE.sub(lambda m: rng.choice(m.group(1).split("|")), text)
        new = _SLOT.sub(slot, new)
        if new == text:
            return text
        text = new


def say(role: str, content: str) -> Message:
    """A chat message."""
    return {"role": role, "content": content}


def share(rows: Sequence[T], part: int | None) -> Sequence[T]:
    """Half of the wording: the even or the odd *rows*, or all of them."""
    return rows if part is None else rows[part::2]
