"""Texts as they are shown: control characters are made visible, colours are steps of a ramp."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from markupsafe import Markup

from saeguard.latents.index import Example

STEPS = 10
"""Steps of the colour ramp; the style sheet has a class for each."""
LONGEST = 120
"""Characters of one token that are shown."""
HIDDEN = {"Cc", "Cf", "Co", "Cs", "Cn", "Zl", "Zp"}
"""Unicode categories that a browser hides, or by which it turns the text around."""


class Shown(NamedTuple):
    """One token of a text."""

    text: str
    step: int
    """0 to `STEPS`: how strongly the latent fires, for the colour."""
    value: float | None
    """Its activation; None if it does not fire."""
    at: int
    strongest: bool = False


def visible(text: str, longest: int = LONGEST) -> str:
    """Return a text with line ends marked and control characters by number, cut if it is long."""
    kept = text[:longest]
    out = "".join(_visible(character) for character in kept)
    return out if len(text) <= longest else f"{out}\u2026 ({len(text):,} characters)"


def unhidden(value: object) -> object:
    """Return what a template prints, with hidden characters of a plain string made visible."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "".join(c if c in "\n\t" else _visible(c) for c in value)


def _visible(character: str) -> str:
    if character == "\n":
        return "\u21b5\n"
    if character == "\t":
        return "\u21e5\t"
    if unicodedata.category(character) in HIDDEN:
        return f"\u27e8U+{ord(character):04X}\u27e9"
    return character


def step(value: float, highest: float) -> int:
    """Return the step of the colour ramp; an activation above 0 has one of at least 1."""
    if value <= 0 or highest <= 0:
        return 0
    return max(1, min(STEPS, round(STEPS * value / highest)))


def shown(example: Example, pieces: Sequence[str], highest: float) -> list[Shown]:
    """Return the tokens of an example.

    Args:
        example: of a latent.
        pieces: the text of each of its tokens.
        highest: the latent's highest activation, which has the full colour.
    """
    fired = dict(example.fired)
    return [
        Shown(
            visible(piece),
            step(fired.get(at, 0.0), highest),
            fired.get(at),
            at,
            strongest=at == example.at,
        )
        for at, piece in enumerate(pieces, example.start)
    ]


def words(pieces: Iterable[str]) -> list[str]:
    """Return tokens for a list, with spaces visible at their ends."""
    return [visible(piece).replace(" ", "\u00b7") or "\u2205" for piece in pieces]
