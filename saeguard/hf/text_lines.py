"""The content of a file of texts, row by row, and everything that is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from saeguard.hf.text_rows import TextError, rows

_UNION_MEMBERS = ("str", "list[Message]")
MOST = 20
"""Mistakes of a file that are listed; the others are counted."""


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(strict=True, extra="forbid")

    role: str = Field(min_length=1)
    content: str


def _as_text(id_: Any) -> Any:
    return str(id_) if type(id_) is int else id_


class Line(BaseModel):
    """One row of a file of texts; keys that are not named here are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")

    id: Annotated[str, BeforeValidator(_as_text)] = Field(min_length=1)
    text: str | None = None
    prompt: str | list[Message] | None = None
    messages: Annotated[list[Message] | None, Field(min_length=1)] = None
    completion: str | None = None
    label: Literal[0, 1] = 0
    kind: str = ""
    template: str = ""
    behaviour: str = ""

    @model_validator(mode="after")
    def _one_form(self) -> Line:
        given = [name for name in ("text", "prompt", "messages") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(
                f"give either `text`, or `prompt` or `messages` with `completion`; found {found}"
            )
        if self.text is not None and self.completion is not None:
            raise ValueError("`completion` goes with `prompt`, not with `text`")
        return self

    @property
    def asked(self) -> str | list[Message]:
        """The prompt: a text, or messages."""
        messages = self.messages or []
        return (messages[:-1] if self._answered else messages) or self.prompt or ""

    @property
    def answer(self) -> str:
        """The output: all of a `text`."""
        if self.text is not None:
            return self.text
        if self.messages and self._answered:
            return self.messages[-1].content
        return self.completion or ""

    @property
    def _answered(self) -> bool:
        """Whether the messages end with the output."""
        last = self.messages[-1].role if self.messages else ""
        return last == "assistant" and self.completion is None


class Mistakes:
    """The mistakes of a file, to be reported together."""

    def __init__(self, path: str | Path) -> None:
        """Start with none.

        Args:
            path: of the file.
        """
        self.path = path
        self.count = 0
        self.listed: list[TextError] = []
        """The first of them."""

    def add(self, error: TextError) -> None:
        """Note one."""
        self.count += 1
        if len(self.listed) < MOST:
            self.listed.append(error)

    def in_words(self) -> list[str]:
        """Return one line for each that is listed, and the number of the others."""
        more = self.count - len(self.listed)
        return [*map(str, self.listed), *([f"{self.path}: {more} more of them"] if more else [])]

    def refuse(self, remedy: str = "") -> None:
        """Raise one error for all, unless there is none.

        Raises:
            TextError: names each of them.
        """
        if self.count:
            heading = f"{self.path}: {self.count} lines are wrong{remedy}"
            if self.count == 1:
                raise TextError(f"{self.listed[0]}{remedy}") from self.listed[0]
            raise TextError("\n".join([*self.in_words(), heading])) from self.listed[0]


def read_lines(path: str | Path) -> Iterator[tuple[int, Line]]:
    """Yield the number and content of each line of `path`; one line is in memory at a time.

    Raises:
        TextError: a line is malformed, or an id occurs twice.
    """
    seen: dict[str, int] = {}
    mistakes = Mistakes(path)
    for number, line in entries(Path(path)):
        try:
            if isinstance(line, TextError):
                raise line
            refuse_repeated(path, number, line.id, seen)
        except TextError as error:
            mistakes.add(error)
        else:
            if not mistakes.count:  # else only what is wrong is of interest
                yield number, line
    mistakes.refuse()


def refuse_repeated(path: str | Path, number: int, id_: str, seen: dict[str, int]) -> None:
    """Refuse an id that occurred before.

    Args:
        path: of the file.
        number: of the line.
        id_: its id.
        seen: line of each id so far; this one is added.

    Raises:
        TextError: names both lines.
    """
    first = seen.setdefault(id_, number)
    if first != number:
        raise TextError(f"{path}:{number}: id: {id_!r} is already on line {first}; rename one")


def entries(path: Path) -> Iterator[tuple[int, Line | TextError]]:
    """Yield the number of each row that is not blank, with its content or what is wrong with it.

    Ids may repeat.

    Raises:
        TextError: the file cannot be read.
    """
    for number, content in rows(path):
        if isinstance(content, TextError):
            yield number, content
            continue
        try:
            yield number, Line.model_validate(content)
        except ValidationError as error:
            # Of the errors of a union's members, the one that got furthest was meant.
            deepest = max(error.errors(), key=lambda e: len(e["loc"]))
            names = [str(part) for part in deepest["loc"] if part not in _UNION_MEMBERS]
            key = ".".join(names) or "line"
            message = deepest["msg"].removeprefix("Value error, ")
            yield number, TextError(f"{path}:{number}: {key}: {message}")
