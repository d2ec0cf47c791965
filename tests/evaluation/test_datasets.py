"""Files are checked before any model is loaded, and read again a line at a time."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saeguard.evaluation.datasets import (
    Dataset,
    EvaluationError,
    chunks,
    data_files,
    lines_at,
    read_datasets,
    spelt,
)
from saeguard.hf.text_rows import TextError
from tests.tiny import tokenizer

CHAT = [{"role": "user", "content": "Hi"}]


def write(path: Path, *lines: Any) -> Path:
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def read(path: Path, *, benign: bool = False) -> Dataset:
    """Read one file."""
    (dataset,) = read_datasets([path], tokenizer(), benign=benign)
    return dataset


def test_rows(tmp_path: Path) -> None:
    """A dataset is named after its file, and keeps labels, sizes and digests without the texts."""
    one = {"id": "a", "behaviour": "noise", "label": 1, "prompt": CHAT, "completion": "Hello"}
    two = {"id": "b", "behaviour": "noise", "text": "Hello", "kind": "k", "template": "t"}
    dataset = read(write(tmp_path / "set.jsonl", one, two))
    assert (dataset.name, dataset.behaviour, dataset.counts) == ("set", "noise", (1, 1))
    assert dataset.template.tolist() == ["a", "t"]
    assert [dataset.length(part).tolist() for part in ("prompt", "output", "both")] == [
        [8, 0],
        [5, 5],
        [13, 5],
    ]


def test_digest_is_of_what_the_model_reads(tmp_path: Path) -> None:
    """It depends on the tokens and on where the prompt ends, not on id or label."""
    rows = [
        {"id": "a", "prompt": "ab", "completion": "c"},
        {"id": "b", "prompt": "ab", "completion": "c", "label": 1},
        {"id": "c", "prompt": "a", "completion": "bc"},
    ]
    a, b, c = read(write(tmp_path / "set.jsonl", *rows)).digest
    assert a == b
    assert a != c


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"id": "a"}], "set.jsonl:1: line: give either `text`"),
        ([{"id": "a", "text": "x", "label": 2}], "set.jsonl:1: label: "),
        ([{"id": "a", "text": "x"}, {"id": "a", "text": "y"}], "set.jsonl:2: id: 'a' is already"),
        ([{"id": "a", "text": "x" * 999}], "set.jsonl:1: 1000 tokens; the model takes 256"),
        (
            [{"id": "a", "text": "x", "behaviour": "p"}, {"id": "b", "text": "y"}],
            "set.jsonl:2: behaviour: found '', expected 'p'",
        ),
        ([], "set.jsonl: the file holds no text"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, lines: list[Any], message: str) -> None:
    """The message has file, line and field."""
    with pytest.raises((TextError, EvaluationError), match=re.escape(message)):
        read(write(tmp_path / "set.jsonl", *lines))


def test_ordinary_texts_have_no_positives(tmp_path: Path) -> None:
    """A labelled file given as ordinary texts would hide its positives among false alarms."""
    file = write(tmp_path / "set.jsonl", {"id": "a", "text": "x", "label": 1})
    with pytest.raises(EvaluationError, match=r"set\.jsonl:1: label: found 1, expected 0"):
        read(file, benign=True)


def test_files_of_folders(tmp_path: Path) -> None:
    """Files below a folder, in order, each once; two of one name take their folder's, too."""
    one = write(tmp_path / "a" / "set.jsonl", {"id": "a", "text": "x"})
    two = write(tmp_path / "b" / "set.jsonl", {"id": "a", "text": "x"})
    files = data_files([tmp_path, one])
    assert files == [one, two]
    assert [d.name for d in read_datasets(files, tokenizer())] == ["a/set", "b/set"]
    with pytest.raises(EvaluationError, match="there is no such file or folder"):
        data_files([tmp_path / "none"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationError, match=r"holds no \.jsonl file"):
        data_files([tmp_path / "empty"])


def test_lines_are_read_again(tmp_path: Path) -> None:
    """Only those at the mask; a file that has changed meanwhile is refused."""
    rows = [{"id": name, "text": name} for name in "abcd"]
    dataset = read(write(tmp_path / "set.jsonl", *rows))
    wanted = np.array([False, True, False, True])
    assert [(i, n, line.id) for i, n, line in lines_at(dataset, wanted)] == [
        (1, 2, "b"),
        (3, 4, "d"),
    ]
    write(tmp_path / "set.jsonl", *rows[1:])
    with pytest.raises(EvaluationError, match="has changed since it was read"):
        list(lines_at(dataset, wanted))


def test_spelt_and_chunks(tmp_path: Path) -> None:
    """Messages are spelt with their roles; chunks keep the order."""
    dataset = read(write(tmp_path / "s.jsonl", {"id": "a", "prompt": CHAT, "completion": "Hello"}))
    ((_, _, line),) = lines_at(dataset, np.array([True]))
    assert spelt(line, "both") == "user: Hi\nHello"
    assert list(chunks(range(5), 2)) == [[0, 1], [2, 3], [4]]
