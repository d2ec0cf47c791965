"""A file of texts is checked whole before anything is read, in bounded memory."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from saeguard.hf import text_files
from saeguard.hf.text_files import check_file
from saeguard.hf.texts import TextError
from tests.tiny import tokenizer


def write(folder: Path, *ids: str) -> Path:
    """Write texts with these ids, each longer than the one before."""
    file = folder / "in.jsonl"
    lines = [json.dumps({"id": id_, "text": "x" * (i + 1)}) for i, id_ in enumerate(ids)]
    file.write_text("\n\n".join(lines) + "\n")
    return file


def test_texts_are_counted_and_read_from_any_index(tmp_path: Path) -> None:
    """Blank lines do not count, but line numbers are those of the file."""
    file = check_file(write(tmp_path, "a", "b", "c"), tokenizer())
    assert (file.count, file.longest, file.longest_at) == (3, 4, 5)
    assert len(file.sha256) == 64
    assert [text.id for text in file.read()] == ["a", "b", "c"]
    assert [text.id for text in file.read(2)] == ["c"]


def test_repeated_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An id that occurs twice is named with both lines; ids of one hash are told apart."""
    with pytest.raises(TextError, match=r"in.jsonl:5: id: 'a' is already on line 1"):
        check_file(write(tmp_path, "a", "b", "a"), tokenizer())
    monkeypatch.setattr(text_files, "_hash", lambda _id: 7)
    assert check_file(write(tmp_path, "a", "b", "c"), tokenizer()).count == 3
    with pytest.raises(TextError, match=r"in.jsonl:5: id: 'b' is already on line 3"):
        check_file(write(tmp_path, "a", "b", "b"), tokenizer())


def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    """Its texts are held, and there is nothing to compare a later run with."""
    content = write(tmp_path, "a", "b").read_bytes()
    readable, writable = os.pipe()
    os.write(writable, content)
    os.close(writable)
    file = check_file(Path(f"/dev/fd/{readable}"), tokenizer())
    os.close(readable)
    assert (file.count, file.sha256) == (2, "")
    assert [text.id for text in file.read(1)] == ["b"]


def test_no_text(tmp_path: Path) -> None:
    """A file of blank lines."""
    (tmp_path / "in.jsonl").write_text("\n\n")
    with pytest.raises(TextError, match=r"in.jsonl: the file holds no text"):
        check_file(tmp_path / "in.jsonl", tokenizer())
