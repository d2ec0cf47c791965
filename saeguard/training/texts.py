"""Read texts to train on, as token ids cut to the context.

A `.jsonl` file holds one object a line, with `text`, or `messages` (a chat, which goes through the
model's chat template), or `prompt` (a string or messages) with an optional `completion`. Other
fields are ignored. Every other file is one text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from saeguard.training.errors import TrainingError

GROUP = 1000
"""Texts that are tokenised at once."""
_UNION_MEMBERS = ("str", "list[_Message]")


@dataclass(frozen=True, slots=True)
class Chunks:
    """Texts cut into chunks of at most `context` tokens."""

    tokens: np.ndarray
    """[T] int32, one chunk after the other."""
    starts: np.ndarray
    """[chunks + 1] int64: where each chunk begins, and T."""
    texts: int
    files: Mapping[str, str]
    """sha256 by file name."""

    def __len__(self) -> int:
        """Return the number of chunks."""
        return len(self.starts) - 1

    def chunk(self, i: int) -> np.ndarray:
        """Return the token ids of one chunk."""
        out: np.ndarray = self.tokens[self.starts[i] : self.starts[i + 1]]
        return out

    def shuffled(self, at: int, seed: int) -> np.ndarray:
        """Return the chunk at position `at` of an endless order, drawn anew for each epoch."""
        epoch, place = divmod(at, len(self))
        return self.chunk(int(shuffled_order(len(self), seed, epoch)[place]))


@lru_cache(maxsize=2)
def shuffled_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of `count` items in one epoch, [count] indices."""
    return np.random.default_rng([seed, epoch]).permutation(count)


class _Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    role: str = Field(min_length=1)
    content: str


class _Line(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    text: str | None = None
    messages: list[_Message] | None = None
    prompt: str | list[_Message] | None = None
    completion: str | None = None

    @model_validator(mode="after")
    def _one_form(self) -> _Line:
        given = [n for n in ("text", "messages", "prompt") if getattr(self, n) is not None]
        if len(given) != 1:
            found = ", ".join(f"`{name}`" for name in given) or "none"
            raise ValueError(f"expected one of `text`, `messages` and `prompt`, found {found}")
        if self.completion is not None and self.prompt is None:
            raise ValueError("`completion` goes with `prompt`")
        return self


def read_chunks(paths: Sequence[Path], tokenizer: Any, context: int) -> Chunks:
    """Read, tokenise and cut every text of `paths`.

    Raises:
        TrainingError: a file cannot be read, a line is malformed, or there is no text.
    """
    pieces: list[np.ndarray] = []
    texts = 0
    group: list[tuple[str, bool]] = []

    def flush() -> None:
        for special in (True, False):
            strings = [text for text, wanted in group if wanted is special]
            if strings:
                for ids in tokenizer(strings, add_special_tokens=special, verbose=False).input_ids:
                    whole = np.array(ids, np.int32)
                    cut = [whole[i : i + context] for i in range(0, len(whole), context)]
                    pieces.extend(piece for piece in cut if len(piece) > 1)
        group.clear()

    for path in paths:
        for found in _strings(path, tokenizer):
            texts += 1
            group.append(found)
            if len(group) == GROUP:
                flush()
    flush()
    if not pieces:
        raise TrainingError(f"{', '.join(map(str, paths))}: no text with two tokens or more")
    lengths = np.array([0, *map(len, pieces)], np.int64)
    return Chunks(
        np.concatenate(pieces), np.cumsum(lengths), texts, {str(p): file_digest(p) for p in paths}
    )


def file_digest(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _strings(path: Path, tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """Yield each text, and whether the tokenizer's own prefix goes in front of it."""
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise TrainingError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TrainingError(f"{path}: byte {error.start}: not UTF-8, expected a text") from error
    if path.suffix != ".jsonl":
        if content.strip():
            yield content, True
        return
    from jinja2 import TemplateError  # noqa: PLC0415 - Transformers brings it, for chat templates

    for number, raw in enumerate(content.split("\n"), 1):
        if not raw.strip():
            continue
        try:
            yield _string(_Line.model_validate(json.loads(raw)), tokenizer)
        except ValidationError as error:
            raise TrainingError(f"{path}:{number}: {_told(error)}") from error
        except (json.JSONDecodeError, RecursionError) as error:
            raise TrainingError(f"{path}:{number}: not JSON: {error}") from error
        except (ValueError, TypeError, TemplateError) as error:  # the template refuses the chat
            raise TrainingError(f"{path}:{number}: messages: {error}") from error


def _string(line: _Line, tokenizer: Any) -> tuple[str, bool]:
    chat = line.messages if line.messages is not None else line.prompt
    if isinstance(chat, list):
        rendered = tokenizer.apply_chat_template(
            [message.model_dump() for message in chat],
            tokenize=False,
            add_generation_prompt=line.messages is None,
        )
        return rendered + (line.completion or ""), False
    return (line.text or "") + (chat or "") + (line.completion or ""), True


def _told(error: ValidationError) -> str:
    """Return field and message of the error that got furthest into the line."""
    deepest = max(error.errors(), key=lambda e: len(e["loc"]))
    names = [str(part) for part in deepest["loc"] if part not in _UNION_MEMBERS]
    return f"{'.'.join(names) or 'line'}: {deepest['msg'].removeprefix('Value error, ')}"
