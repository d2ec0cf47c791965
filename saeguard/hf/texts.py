"""Read texts from JSON lines, and tokenise them as the server would.

A line has an `id` and either `text`, or `prompt` (a string, or a list of chat messages) with an
optional `completion`. Chat messages go through the model's chat template with its generation
prompt, and the completion's tokens follow. A `text`, or a completion after an empty prompt,
follows the tokenizer's own prefix (BOS) and counts as output.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from saeguard.errors import InputError

_UNION_MEMBERS = ("str", "list[Message]")


class TextError(InputError):
    """A line of an input file is wrong; the message names file, line and field."""


@dataclass(frozen=True, slots=True)
class Text:
    """One tokenised text with its labels."""

    id: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    """Number of prompt tokens, which come first."""
    label: int = 0
    """1 if the text shows the behaviour, else 0."""
    kind: str = ""
    template: str = ""
    """Texts of one template are near copies, and are resampled together."""


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(strict=True, extra="forbid")

    role: str = Field(min_length=1)
    content: str


class Line(BaseModel):
    """One line of a file of texts; keys that are not named here are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")

    id: str = Field(min_length=1)
    text: str | None = None
    prompt: str | list[Message] | None = None
    completion: str | None = None
    label: Literal[0, 1] = 0
    kind: str = ""
    template: str = ""
    behaviour: str = ""

    @model_validator(mode="after")
    def _one_form(self) -> Line:
        if (self.text is None) == (self.prompt is None):
            raise ValueError("give either `text`, or `prompt` with `completion`")
        if self.text is not None and self.completion is not None:
            raise ValueError("`completion` goes with `prompt`, not with `text`")
        return self


def read_texts(path: str | Path, tokenizer: Any) -> list[Text]:
    """Read and tokenise every line of `path`; blank lines are skipped.

    Raises:
        TextError: a line is malformed, an id occurs twice, or a text is longer than the model's
            context.
    """
    return [text_of(path, number, line, tokenizer) for number, line in read_lines(path)]


def text_of(path: str | Path, number: int, line: Line, tokenizer: Any) -> Text:
    """Tokenise one line of `path`.

    Raises:
        TextError: it gives no token, or more than the model takes, or the chat template refuses it.
    """
    try:
        prompt, completion = _tokenise(line, tokenizer)
    except (ValueError, TypeError) as error:  # raised by chat templates, too
        raise TextError(f"{path}:{number}: prompt: {error}") from error
    if not prompt and not completion:
        raise TextError(f"{path}:{number}: the text gives no token")
    limit = getattr(tokenizer, "model_max_length", None)
    if limit and len(prompt) + len(completion) > limit:
        raise TextError(
            f"{path}:{number}: {len(prompt) + len(completion)} tokens; the model takes {limit}"
        )
    tokens = (*prompt, *completion)
    template = line.template or line.id
    return Text(line.id, tokens, len(prompt), line.label, line.kind, template)


def make_text(
    id_: str, tokenizer: Any, prompt: str | Sequence[tuple[str, str]], completion: str
) -> Text:
    """Tokenise one text that does not come from a file.

    Args:
        id_: its name.
        tokenizer: the model's.
        prompt: a text, or the role and content of each message of a chat.
        completion: the answer.

    Raises:
        TextError: the chat template refuses the messages, or there is no token.
    """
    given: Any = prompt
    if not isinstance(prompt, str):
        given = [Message(role=role, content=content) for role, content in prompt]
    try:
        line = Line(id=id_, prompt=given, completion=completion)
        before, after = _tokenise(line, tokenizer)
    except (ValueError, TypeError) as error:  # raised by chat templates, too
        raise TextError(f"{id_}: {error}") from error
    if not before and not after:
        raise TextError(f"{id_}: the text gives no token")
    return Text(id_, (*before, *after), len(before))


def make_turn(id_: str, tokenizer: Any, prompt: str, completion: str) -> Text:
    """Tokenise a prompt and its completion; if the model has a chat template, as a user message.

    Raises:
        TextError: as `make_text`.
    """
    chat = bool(tokenizer.chat_template) and bool(prompt)
    return make_text(id_, tokenizer, [("user", prompt)] if chat else prompt, completion)


def _tokenise(line: Line, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens of a line's prompt and of its completion."""

    def ids(text: str, *, special: bool) -> list[int]:
        return list(tokenizer(text, add_special_tokens=special)["input_ids"])

    completion = line.text if line.text is not None else line.completion or ""
    prompt = line.prompt or ""
    if isinstance(prompt, str):
        # A prompt that spells BOS out already must not get a second one.
        bos = tokenizer.bos_token
        doubled = bool(bos) and (prompt or completion).startswith(bos)
        return ids(prompt, special=not doubled), ids(completion, special=False)
    rendered = tokenizer.apply_chat_template(
        [message.model_dump() for message in prompt], tokenize=False, add_generation_prompt=True
    )
    return ids(rendered, special=False), ids(completion, special=False)


def read_lines(path: str | Path) -> Iterator[tuple[int, Line]]:
    """Yield the number and content of each line of `path`; one line is in memory at a time.

    Raises:
        TextError: a line is malformed, or an id occurs twice.
    """
    seen: dict[str, int] = {}
    for number, line in unchecked_lines(Path(path)):
        if line.id in seen:
            raise TextError(f"{path}:{number}: id: {line.id!r} is already on line {seen[line.id]}")
        seen[line.id] = number
        yield number, line


def unchecked_lines(path: Path) -> Iterator[tuple[int, Line]]:
    """Yield the number and content of each line that is not blank; ids may repeat.

    Raises:
        TextError: the file cannot be read, or a line is malformed.
    """
    for number, raw in _raw_lines(path):
        if not raw.strip():
            continue
        try:
            yield number, Line.model_validate(json.loads(raw))
        except ValidationError as error:
            # Of the errors of a union's members, the one that got furthest was meant.
            deepest = max(error.errors(), key=lambda e: len(e["loc"]))
            names = [str(part) for part in deepest["loc"] if part not in _UNION_MEMBERS]
            field = ".".join(names) or "line"
            message = deepest["msg"].removeprefix("Value error, ")
            raise TextError(f"{path}:{number}: {field}: {message}") from error
        except (ValueError, RecursionError) as error:
            raise TextError(f"{path}:{number}: not JSON: {error}") from error


def _raw_lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            yield from enumerate(file, 1)
    except OSError as error:
        raise TextError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TextError(f"{path}: not UTF-8; expected JSON lines, one text a line") from error
