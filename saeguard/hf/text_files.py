"""Files of texts that do not fit in memory: checked in one pass, read in another."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from saeguard.hf.text_lines import Line, Mistakes, entries
from saeguard.hf.text_rows import TextError
from saeguard.hf.texts import Text, TooLongError, text_of

REMEDY = "; mend them, or leave them out with --skip"
NO_LIMIT = 10**9
"""Tokenizers that know of no bound state a number far above this."""
LONG = "; texts that are too long can be cut with --truncate"


@dataclass(frozen=True, slots=True)
class TextFile:
    """A file of texts, every line of which was checked."""

    path: Path
    tokenizer: Any
    numbers: np.ndarray
    """[texts] int64 line of each text that is read."""
    lengths: np.ndarray
    """[texts] int64 tokens of each, before it is cut."""
    sha256: str
    """Of the content; empty for a pipe, which is read once."""
    left_out: frozenset[int] = frozenset()
    """Lines that are not read."""
    mistakes: tuple[str, ...] = ()
    """What is wrong with them, as far as it is listed."""
    skip: bool = False
    """Whether lines that are wrong may be left out."""
    truncate: bool = False
    """Whether texts may be cut."""
    most: int | None = None
    """Tokens to which longer texts are cut; None cuts none."""
    held: tuple[Text, ...] | None = None
    """The texts, of a pipe."""

    @property
    def count(self) -> int:
        """Number of texts."""
        return len(self.numbers)

    @property
    def longest(self) -> int:
        """Tokens of the longest text, as it is read."""
        whole = int(self.lengths.max())
        return whole if self.most is None else min(whole, self.most)

    @property
    def longest_at(self) -> int:
        """Its line."""
        return int(self.numbers[self.lengths.argmax()])

    @property
    def cut(self) -> int:
        """Number of texts that are cut."""
        return 0 if self.most is None else int((self.lengths > self.most).sum())

    def read(self, first: int = 0) -> Iterator[Text]:
        """Yield the texts from index `first` on.

        Raises:
            TextError: the file has changed since it was checked, so that a line is wrong.
        """
        if self.held is not None:
            return (_cut(text, self.most) for text in self.held[first:])
        lines = (e for e in entries(self.path) if e[0] not in self.left_out)
        return (self._text(number, line) for number, line in islice(lines, first, None))

    def _text(self, number: int, line: Line | TextError) -> Text:
        if isinstance(line, TextError):
            raise line
        return text_of(self.path, number, line, self.tokenizer, most=self.most)

    def fitted(self, longest: int | None) -> TextFile:
        """Return the file for an engine that takes `longest` tokens; None for no bound of its own.

        Raises:
            TextError: texts are longer, and may be neither cut nor left out; or all are left out.
        """
        if longest is None or self.longest <= longest:
            return self
        if self.truncate:
            return replace(self, most=longest)
        mistakes, long = Mistakes(self.path), self.lengths > longest
        for number, tokens in zip(self.numbers[long], self.lengths[long], strict=True):
            mistakes.add(
                TextError(
                    f"{self.path}:{number}: {tokens} tokens; this engine takes {longest}, since "
                    "vLLM samples one more; shorten the text, or raise --max-model-len in "
                    "--vllm-args if the model takes more"
                )
            )
        if not self.skip:
            mistakes.refuse(f"{REMEDY}{LONG}")
        fitting = replace(
            self,
            numbers=self.numbers[~long],
            lengths=self.lengths[~long],
            left_out=self.left_out | frozenset(self.numbers[long].tolist()),
            mistakes=(*self.mistakes, *mistakes.in_words()),
            held=None if self.held is None else tuple(_where(self.held, ~long)),
        )
        return _not_empty(fitting)


def _cut(text: Text, most: int | None) -> Text:
    kept = text.tokens[:most]
    before = min(text.prompt_tokens, len(kept))
    return replace(
        text, tokens=kept, prompt_tokens=before, cut=text.cut + len(text.tokens) - len(kept)
    )


def _not_empty(file: TextFile) -> TextFile:
    if not file.count:
        wrong = "; every line is wrong" if file.left_out else ""
        raise TextError("\n".join([*file.mistakes, f"{file.path}: the file holds no text{wrong}"]))
    return file


def check_file(
    path: Path, tokenizer: Any, *, truncate: bool = False, skip: bool = False
) -> TextFile:
    """Check every line of a file, before a model is loaded for hours of work.

    Every text is tokenised, here and again when it is read. 24 bytes are held for each text: its
    line, its length, and a hash of its id to find repeated ids. A pipe cannot be read twice, so its
    texts are held.

    Args:
        path: of the file.
        tokenizer: the model's.
        truncate: cut texts that are longer than the model's context, in place of refusing them.
        skip: leave out lines that are wrong, in place of refusing the file.

    Raises:
        TextError: names all lines that are malformed, repeat an id or are longer than the model's
            context; or there is no text.
    """
    most = _context(tokenizer) if truncate else None
    held: list[Text] | None = None if path.is_file() else []
    numbers, lengths, ids = array("q"), array("q"), array("Q")
    mistakes, left_out, long = Mistakes(path), set[int](), 0
    for number, line in tqdm(entries(path), desc="check", unit="text"):
        try:
            if isinstance(line, TextError):
                raise line
            text = text_of(path, number, line, tokenizer, most=most)
        except TextError as error:
            mistakes.add(error)
            left_out.add(number)
            long += isinstance(error, TooLongError)
            continue
        numbers.append(number)
        lengths.append(len(text.tokens) + text.cut)
        ids.append(_hash(line.id))
        if held is not None:
            held.append(text)
    repeated = set[int]()
    for number, again in _repeated(path, np.frombuffer(ids, np.uint64), numbers, held):
        mistakes.add(again)
        repeated.add(number)
    if not skip:
        mistakes.refuse(f"{REMEDY}{LONG if long else ''}")
    kept = ~np.isin(np.frombuffer(numbers, np.int64), list(repeated))
    return _not_empty(
        TextFile(
            path,
            tokenizer,
            numbers=np.frombuffer(numbers, np.int64)[kept],
            lengths=np.frombuffer(lengths, np.int64)[kept],
            sha256=_digest(path) if held is None else "",
            left_out=frozenset(left_out | repeated),
            mistakes=tuple(mistakes.in_words()),
            skip=skip,
            truncate=truncate,
            most=most,
            held=None if held is None else tuple(_where(held, kept)),
        )
    )


def _context(tokenizer: Any) -> int | None:
    """Return the tokens that the model takes, None if its tokenizer does not state it."""
    limit = int(getattr(tokenizer, "model_max_length", 0) or 0)
    return limit if 0 < limit < NO_LIMIT else None


def _where(texts: Iterable[Text], kept: np.ndarray) -> Iterator[Text]:
    return (text for text, is_kept in zip(texts, kept.tolist(), strict=True) if is_kept)


def _hash(id_: str) -> int:
    return int.from_bytes(hashlib.blake2b(id_.encode(), digest_size=8).digest())


def _repeated(
    path: Path, ids: np.ndarray, numbers: array[int], held: list[Text] | None
) -> Iterator[tuple[int, TextError]]:
    """Yield the line and the mistake of each id that occurs again.

    Args:
        path: of the file.
        ids: [texts] uint64 hash of each id. Few ids share a hash, and those are looked at again.
        numbers: the line of each.
        held: the texts of a pipe.
    """
    hashes, counts = np.unique(ids, return_counts=True)
    alike = set(hashes[counts > 1].tolist())
    if not alike:
        return
    found = _ids(path, set(numbers)) if held is None else _ids_held(held, numbers)
    seen: dict[str, int] = {}
    for number, id_ in found:
        if _hash(id_) not in alike:
            continue
        first = seen.setdefault(id_, number)
        if first != number:
            what = f"id: {id_!r} is already on line {first}; rename one"
            yield number, TextError(f"{path}:{number}: {what}")


def _ids(path: Path, numbers: set[int]) -> Iterator[tuple[int, str]]:
    for number, line in entries(path):
        if number in numbers and isinstance(line, Line):
            yield number, line.id


def _ids_held(held: list[Text], numbers: array[int]) -> Iterator[tuple[int, str]]:
    return ((number, text.id) for number, text in zip(numbers, held, strict=True))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
