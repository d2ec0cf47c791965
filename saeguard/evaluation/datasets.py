"""Labelled datasets: JSON-lines files, of which only labels and digests stay in memory.

A text's row takes some hundred bytes. The texts themselves are read again when they are needed, a
chunk at a time, so a file may be larger than memory.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
from tqdm import tqdm

from saeguard.errors import InputError
from saeguard.hf.text_lines import Line, read_lines
from saeguard.hf.texts import Text, text_of

Part: TypeAlias = Literal["output", "prompt", "both"]
"""Which part of a text a detector reads: as policies' scopes, with all roles of a prompt as one."""

PARTS: tuple[Part, ...] = ("output", "prompt", "both")


T = TypeVar("T")


class EvaluationError(InputError):
    """The data, or the choice of policies for it, is wrong; names file, line and field."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """One file of labelled texts, without the texts."""

    name: str
    path: Path
    behaviour: str
    """As its lines have it; empty if they do not."""
    sha256: str
    """Of the file."""
    ids: tuple[str, ...]
    label: np.ndarray
    """[texts] bool."""
    kind: np.ndarray
    """[texts] str."""
    template: np.ndarray
    """[texts] str."""
    digest: tuple[bytes, ...]
    """Per text: of its token ids and where the prompt ends, hence of what the model reads."""
    characters: np.ndarray
    """[texts, 2] characters of prompt and output."""

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.ids)

    def length(self, part: Part) -> np.ndarray:
        """Return the characters [texts] of one part of each text."""
        prompt, output = self.characters.T
        of_part: np.ndarray = {"prompt": prompt, "output": output, "both": prompt + output}[part]
        return of_part

    @property
    def counts(self) -> tuple[int, int]:
        """Return how many texts have label 1, and how many label 0."""
        positives = int(self.label.sum())
        return positives, len(self) - positives


def data_files(paths: Sequence[Path]) -> list[Path]:
    """Return the `.jsonl` files that `paths` name, and those below folders, each once.

    Raises:
        EvaluationError: a path is missing, or a folder holds no such file.
    """
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise EvaluationError(f"{path}: there is no such file or folder")
        below = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
        if not below:
            raise EvaluationError(f"{path}: the folder holds no .jsonl file")
        files += below
    return list(dict.fromkeys(files))


def read_datasets(files: Sequence[Path], tokenizer: Any, *, benign: bool = False) -> list[Dataset]:
    """Read and check every line of every file.

    Args:
        files: one dataset each.
        tokenizer: the model's.
        benign: whether these are ordinary texts, all of label 0.

    Raises:
        TextError: a line is malformed; names file, line and field.
        EvaluationError: a file holds no text, texts of two behaviours, or an ordinary text of
            label 1.
    """
    found = [_read(file, tokenizer, benign=benign) for file in files]
    times = Counter(dataset.name for dataset in found)
    return [
        replace(d, name=f"{d.path.parent.name}/{d.name}") if times[d.name] > 1 else d for d in found
    ]


def _read(path: Path, tokenizer: Any, *, benign: bool) -> Dataset:
    rows: list[tuple[Any, ...]] = []
    first = ""
    for number, line in tqdm(read_lines(path), desc=f"read {path.name}", unit="text", leave=False):
        if rows and line.behaviour != first:
            raise EvaluationError(
                f"{path}:{number}: behaviour: found {line.behaviour!r}, expected {first!r} as on "
                "the lines before; write the texts of each behaviour to a file of their own"
            )
        if benign and line.label:
            raise EvaluationError(
                f"{path}:{number}: label: found 1, expected 0: --benign takes ordinary texts; give "
                "labelled texts with --data"
            )
        first = line.behaviour
        text = text_of(path, number, line, tokenizer)
        size = (len(spelt(line, "prompt")), len(spelt(line, "output")))
        rows.append((line.id, bool(line.label), line.kind, text.template, text_digest(text), size))
    if not rows:
        raise EvaluationError(f"{path}: the file holds no text")
    ids, label, kind, template, digests, characters = zip(*rows, strict=True)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return Dataset(
        name=path.stem,
        path=path,
        behaviour=first,
        sha256=sha256,
        ids=ids,
        label=np.array(label),
        kind=np.array(kind),
        template=np.array(template),
        digest=digests,
        characters=np.array(characters, np.int64),
    )


def text_digest(text: Text) -> bytes:
    """Return the digest [16 bytes] of what the model reads of a text."""
    ids = np.array([text.prompt_tokens, *text.tokens], np.int64)
    return hashlib.sha256(ids.tobytes()).digest()[:16]


def lines_at(dataset: Dataset, wanted: np.ndarray) -> Iterator[tuple[int, int, Line]]:
    """Yield index, line number and content of the texts at which the mask [texts] is true.

    Raises:
        EvaluationError: the file has changed since it was read.
    """
    left = int(wanted.sum())
    for i, (number, line) in enumerate(read_lines(dataset.path) if left else ()):
        if i >= len(dataset) or line.id != dataset.ids[i]:
            raise EvaluationError(
                f"{dataset.path}:{number}: the file has changed since it was read; run again"
            )
        if wanted[i]:
            yield i, number, line
            left -= 1
        if not left:
            return


def chunks(lines: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield the lines in lists of `size`, the last one shorter."""
    left = iter(lines)
    while some := list(islice(left, size)):
        yield some


def spelt(line: Line, part: Part) -> str:
    """Return one part of a text as it stands in its file; messages follow their roles."""
    output, prompt = line.answer, line.asked
    if not isinstance(prompt, str):
        prompt = "\n".join(f"{message.role}: {message.content}" for message in prompt)
    if part == "both":
        return f"{prompt}\n{output}" if prompt and output else prompt or output
    return output if part == "output" else prompt
