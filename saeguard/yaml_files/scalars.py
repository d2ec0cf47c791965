"""Read plain YAML scalars as YAML 1.1 and 1.2 readers agree, and refuse the rest.

`no` is a boolean to one reader and text to the next, `012` is ten or twelve, `1:30` is ninety.
A file that people review must not depend on that, so such spellings must be quoted.
"""

from __future__ import annotations

import re
from datetime import date
from typing import TypeAlias

from saeguard.errors import InputError

Scalar: TypeAlias = str | int | float | bool | date | None

# C0 and C1 controls but tab and newline; line and paragraph separators, which count as line
# breaks to YAML but not to editors; bidirectional controls, which reorder what a reviewer sees;
# byte order marks, lone surrogates and non-characters; characters without a shape, but for the
# joiners and variation selectors that scripts and emoji need.
CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
    r"\ufeff\ud800-\udfff\ufffe\uffff"
    r"\u00ad\u034f\u115f\u1160\u17b4\u17b5\u180e\u200b\u2060-\u2065\u206a-\u206f\u3164\uffa0"
    r"\U000e0000-\U000e007f]"
)
_NULL = {"", "~", "null"}
_BOOLEAN = {"true": True, "false": False}
_BOOLEAN_TO_SOME = {"y", "n", "yes", "no", "on", "off"}
_STARTS_A_NUMBER = frozenset("+-.0123456789")
"""Most texts are words; only these need the patterns below."""
_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,17})")
_DECIMAL = re.compile(r"-?(0|[1-9][0-9]{0,17})\.[0-9]{1,30}")
_EXPONENT = re.compile(r"-?(0|[1-9][0-9]{0,17})\.[0-9]{1,30}e[-+][0-9]{1,3}")
"""The one spelling of an exponent that YAML 1.1 and 1.2 read alike."""
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_NUMBER_TO_SOME = re.compile(
    r"""
      [-+]? ( 0[xob][0-9a-f_]+                                # 0x1F, 0o17
            | \.?[0-9][0-9_]* (\.[0-9_]*)? (e[-+]?[0-9]+)?    # 012, 1_000, +1, .5, 1., 1e9
            | [0-9][0-9_]* (:[0-5]?[0-9])+ (\.[0-9_]*)?       # 1:30
            | \.inf )
    | \.nan
    """,
    re.IGNORECASE | re.VERBOSE,
)
_TIME_TO_SOME = re.compile(
    r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2} ( (t|[ ]+) [0-9]{1,2}:[0-9]{2} .* )?",
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)

_KINDS: dict[type, str] = {
    int: "the number {}",
    float: "the number {}",
    date: "the date {}",
    str: "text",
    dict: "a mapping",
    list: "a list",
}


class AmbiguousError(InputError):
    """The spelling means different things to different YAML readers."""


def plain(text: str, *, exponents: bool = False) -> Scalar:
    """Return the value of an unquoted scalar.

    Args:
        text: as written.
        exponents: whether a number may be written as in 1.5e-05.

    Raises:
        AmbiguousError: the message says what is unclear and how to write it.
    """
    lower = text.lower()
    if lower in _NULL:
        return None
    if lower in _BOOLEAN:
        return _BOOLEAN[lower]
    if lower in _BOOLEAN_TO_SOME:
        raise AmbiguousError("some YAML readers take this for true or false; put it in quotes")
    return _number(text, exponents) if text[0] in _STARTS_A_NUMBER else text


def _number(text: str, exponents: bool) -> Scalar:
    """Return a number, a date, or the text that only looks like one."""
    if exponents and _EXPONENT.fullmatch(text):
        return float(text)
    if _INTEGER.fullmatch(text):
        return int(text)
    if _DECIMAL.fullmatch(text):
        return float(text)
    if _DATE.fullmatch(text):
        try:
            return date.fromisoformat(text)
        except ValueError:
            raise AmbiguousError("expected a day of the calendar, such as 2027-02-28") from None
    if _NUMBER_TO_SOME.fullmatch(text):
        raise AmbiguousError(
            "YAML readers disagree on this number; write it in plain decimals such as 0.5 or 12, "
            "or put it in quotes if it is text"
        )
    if _TIME_TO_SOME.fullmatch(text):
        raise AmbiguousError(
            "some YAML readers take this for a time; write a day as in 2027-02-01, "
            "or put it in quotes if it is text"
        )
    return text


def describe(value: object) -> str:
    """Return what a value is, in words for messages."""
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    for type_, words in _KINDS.items():
        if isinstance(value, type_):
            return words.format(value)
    return "nothing"
