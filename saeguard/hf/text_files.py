"""Files of texts that do not fit in memory: checked in one pass, read in another."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from saeguard.hf.texts import Text, TextError, read_texts, text_of, unchecked_lines


@dataclass(frozen=True, slots=True)
class TextFile:
    """A file of texts, every line of which was checked."""

    path: Path
    tokenizer: Any
    count: int
    """Number of texts."""
    longest: int
    """Tokens of the longest text."""
    longest_at: int
    """Its line."""
    sha256: str
    """Of the content; empty for a pipe, which is read once."""
    held: tuple[Text, ...] | None = None
    """All texts, of a pipe."""

    def read(self, first: int = 0) -> Iterator[Text]:
        """Yield the texts from index `first` on.

        Raises:
            TextError: the file has changed since it was checked, so that a line is wrong.
        """
        if self.held is not None:
            return iter(self.held[first:])
        lines = islice(unchecked_lines(self.path), first, None)
        return (text_of(self.path, number, line, self.tokenizer) for number, line in lines)


def check_file(path: Path, tokenizer: Any) -> TextFile:
    """Check every line of a file, before a model is loaded for hours of work.

    Every text is tokenised, here and again when it is read. Eight bytes are held for each text, to
    find repeated ids. A pipe cannot be read twice, so its texts are held.

    Raises:
        TextError: a line is malformed, an id occurs twice, a text is longer than the model's
            context, or there is no text.
    """
    if not path.is_file():
        held = tuple(read_texts(path, tokenizer))
        return _made(path, tokenizer, [(i, t) for i, t in enumerate(held, 1)], "", held)
    ids = array("Q")
    checked = _made(path, tokenizer, _noted(path, tokenizer, ids), _digest(path), None)
    _refuse_repeated(path, np.frombuffer(ids, np.uint64))
    return checked


def _made(
    path: Path, tokenizer: Any, texts: Any, sha256: str, held: tuple[Text, ...] | None
) -> TextFile:
    count = longest = longest_at = 0
    for number, text in texts:
        count += 1
        if len(text.tokens) > longest:
            longest, longest_at = len(text.tokens), number
    if not count:
        raise TextError(f"{path}: the file holds no text")
    return TextFile(path, tokenizer, count, longest, longest_at, sha256, held)


def _noted(path: Path, tokenizer: Any, ids: array[int]) -> Iterator[tuple[int, Text]]:
    for number, line in tqdm(unchecked_lines(path), desc="check", unit="text"):
        ids.append(_hash(line.id))
        yield number, text_of(path, number, line, tokenizer)


def _hash(id_: str) -> int:
    return int.from_bytes(hashlib.blake2b(id_.encode(), digest_size=8).digest())


def _refuse_repeated(path: Path, ids: np.ndarray) -> None:
    """Refuse a file in which an id occurs twice.

    Args:
        path: of the file.
        ids: [texts] uint64 hash of each id. Few ids share a hash, and those are looked at again.
    """
    hashes, counts = np.unique(ids, return_counts=True)
    alike = set(hashes[counts > 1].tolist())
    seen: dict[str, int] = {}
    for number, line in unchecked_lines(path) if alike else ():
        if _hash(line.id) not in alike:
            continue
        if line.id in seen:
            raise TextError(f"{path}:{number}: id: {line.id!r} is already on line {seen[line.id]}")
        seen[line.id] = number


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
