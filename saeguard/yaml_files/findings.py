"""A finding: one mistake in a file, with its position, its code and what to do."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, TypeAlias

from saeguard.errors import InputError
from saeguard.yaml_files.codes import Code, page

Level: TypeAlias = Literal["error", "warning", "note"]

MOST_CHARACTERS = 20_000
"""Of a message about files that are refused; a folder may hold thousands of mistakes."""
SHOWN = 60
"""Characters of a value that a message quotes at most."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One mistake: its position, what was found, what was expected and what to do."""

    path: Path
    line: int
    """Counted from 1; 0 if the file as a whole is meant."""
    column: int
    """In characters, counted from 1; 0 if the file as a whole is meant."""
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


class FindingsError(InputError):
    """Every mistake that was found, in the order of files and lines."""

    def __init__(self, errors: Iterable[Finding]) -> None:
        self.errors = in_order(errors)
        super().__init__(self.errors)

    def __str__(self) -> str:
        return render_all(self.errors)


def in_order(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return findings in the order of files, lines, columns and codes."""
    key = lambda f: (os.fspath(f.path), f.line, f.column, f.code)  # noqa: E731
    return tuple(sorted(findings, key=key))


def render_all(findings: Sequence[Finding], style: Callable[[str], str] = str) -> str:
    """Return findings as text; the first of each code is followed by the address of its page.

    Args:
        findings: in the order to be printed.
        style: what to do with the line that holds the address, such as to dim it.
    """
    explained: set[Code] = set()
    lines = []
    for finding in findings:
        lines.append(finding.render())
        if finding.code not in explained:
            explained.add(finding.code)
            lines.append(style(f"  help: {page(finding.code)}"))
    return "\n".join(lines)


def printable(text: str) -> str:
    """Return `text` at the same length, without characters that could steer a terminal."""
    return "".join(c if c.isprintable() else " " if c == "\t" else "\ufffd" for c in text)


def bounded(message: str) -> str:
    """Return a message fit for log, event and status file: no control characters, never long."""
    lines = [printable(line) for line in message.splitlines()]
    kept: list[str] = []
    room = MOST_CHARACTERS
    for line in lines:
        room -= len(line) + 1
        if room < 0:
            kept.append(f"{line[:200]}... ({len(lines) - len(kept)} more lines)")
            break
        kept.append(line)
    return "\n".join(kept)


def show(value: object) -> str:
    """Return `value` as a message quotes it: in quotes if it is text, and never long."""
    text = str(value)
    text = printable(text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}...")
    return f'"{text}"' if isinstance(value, str) else text


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `did you mean "x"? ` if a known word is near, else nothing."""
    near = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean {show(near[0])}? " if near else ""
