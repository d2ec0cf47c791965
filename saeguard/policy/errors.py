"""What is wrong with a policy file, and where."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, TypeAlias

from saeguard.errors import SaeguardError

Level: TypeAlias = Literal["error", "warning", "note"]

Code: TypeAlias = Literal[
    # the file
    "not-found",
    "unreadable",
    "file-name",
    "link-loop",
    "too-large",
    "too-many-files",
    "no-policies",
    "not-utf8",
    "control-character",
    # YAML
    "yaml-syntax",
    "empty-file",
    "several-documents",
    "directive",
    "anchor",
    "alias",
    "tag",
    "merge-key",
    "key-type",
    "duplicate-key",
    "no-value",
    "ambiguous-value",
    "too-deep",
    "too-many-values",
    # keys and values
    "unknown-key",
    "missing-key",
    "wrong-type",
    "not-allowed",
    "out-of-range",
    "too-long",
    "empty-value",
    "bad-name",
    "bad-phrase",
    "invalid-value",
    # the condition
    "condition-syntax",
    "condition-mixed",
    "condition-count",
    "condition-size",
    "unknown-selection",
    "unused-selection",
    "holds-when-quiet",
    "never-holds",
    # the policy as a whole
    "on-error-missing",
    "clamp-missing",
    "clamp-unused",
    "clamp-edit",
    "message-unused",
    "duplicate-id",
    "duplicate-name",
    "exception-expired",
    "review-due",
    "forgeable-turn",
    # what it refers to
    "unknown-feature-set",
    "unknown-feature",
    "no-clamp-latents",
    "bad-feature-set",
    "not-calibrated",
    "approximate-topk",
    "other-model",
    "to-do",
    # its tests
    "test-missing",
    "test-orphan",
    "test-policy",
    "test-cases",
    "test-kind",
    "test-trace",
    "test-recording",
    "test-expectation",
    "test-failed",
    "test-passes",
]
"""Short and stable, so that they can be searched for and switched on in CI."""

SHOWN = 60
"""Characters of a value that a message quotes at most."""


@dataclass(frozen=True, slots=True)
class PolicyError:
    """One mistake: what was found, where, what is allowed and what to do."""

    path: Path
    line: int
    """Counted from 1; 0 where the file as a whole is meant."""
    column: int
    """In characters, counted from 1; 0 where the file as a whole is meant."""
    code: Code
    message: str
    source: str = ""
    """The line that `column` points into."""
    level: Level = "error"

    def render(self) -> str:
        """Return `file:line:col: error[code]: message`, the source line and a caret."""
        place = [printable(os.fspath(self.path)), *([self.line, self.column] if self.line else [])]
        head = f"{':'.join(map(str, place))}: {self.level}[{self.code}]: {printable(self.message)}"
        if not self.source.strip():
            return head
        number = str(self.line)
        gutter = " " * len(number)
        start = max(0, self.column - 80)
        shown = printable(self.source[start : start + 120])
        caret = " " * (self.column - 1 - start) + "^"
        return f"{head}\n  {number} | {shown.rstrip()}\n  {gutter} | {caret}"


class PolicyErrors(SaeguardError):  # noqa: N818 - the plural says that all of them are here
    """Every mistake that was found, in the order of files and lines."""

    def __init__(self, errors: Iterable[PolicyError]) -> None:
        self.errors = tuple(
            sorted(errors, key=lambda e: (os.fspath(e.path), e.line, e.column, e.code))
        )
        super().__init__(self.errors)

    def __str__(self) -> str:
        return "\n".join(error.render() for error in self.errors)


def printable(text: str) -> str:
    """Return `text` at the same length, with nothing in it that could steer a terminal."""
    return "".join(c if c.isprintable() else " " if c == "\t" else "\ufffd" for c in text)


def show(value: object) -> str:
    """Return `value` as a message quotes it: in quotes where it is text, and never long."""
    text = str(value)
    text = printable(text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}...")
    return f'"{text}"' if isinstance(value, str) else text


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `did you mean "x"? ` where something known is near, else nothing."""
    near = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean {show(near[0])}? " if near else ""
