"""A file of texts is checked whole before anything is read, in bounded memory."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from saeguard.hf import text_files
from saeguard.hf.text_files import check_file
from saeguard.hf.text_rows import TextError
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


def rows(folder: Path) -> Path:
    """Write lines of which most are wrong: 1 and 4 are right, 5 is too long."""
    lines = ['{"id": "a", "text": "x"}', "{", '{"id": "b"}', '{"id": "c", "text": "y"}']
    lines += [json.dumps({"id": "d", "text": "z" * 300}), '{"id": "a", "text": "again"}']
    file = folder / "in.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


def test_all_lines_that_are_wrong_are_named(tmp_path: Path) -> None:
    """At once, with what to do: nobody waits for the next one."""
    with pytest.raises(TextError) as caught:
        check_file(rows(tmp_path), tokenizer())
    said = str(caught.value)
    assert all(f"in.jsonl:{n}: " in said for n in (2, 3, 5, 6))
    assert said.endswith(
        "4 lines are wrong; mend them, or leave them out with --skip; texts that are too long can "
        "be cut with --truncate"
    )


@pytest.mark.parametrize("pipe", [False, True])
def test_lines_left_out_and_texts_cut(tmp_path: Path, *, pipe: bool) -> None:
    """What is left of a file is read the same from any index, and what is not is listed."""
    content = rows(tmp_path).read_bytes()
    path = tmp_path / "in.jsonl"
    if pipe:
        readable, writable = os.pipe()
        os.write(writable, content)
        os.close(writable)
        path = Path(f"/dev/fd/{readable}")
    file = check_file(path, tokenizer(), skip=True, truncate=True)
    texts = list(file.read())
    assert [(t.id, len(t.tokens), t.cut) for t in texts] == [
        ("a", 2, 0),
        ("c", 2, 0),
        ("d", 256, 45),
    ]
    assert (file.count, file.cut, file.longest, file.longest_at) == (3, 1, 256, 5)
    assert list(file.read(2)) == texts[2:]
    assert sorted(file.left_out) == [2, 3, 6]
    assert len(file.mistakes) == 3

    shorter = file.fitted(100)
    assert [(len(t.tokens), t.cut) for t in shorter.read(1)] == [(2, 0), (100, 201)]
    assert file.fitted(None) is file


def test_texts_that_the_engine_does_not_take(tmp_path: Path) -> None:
    """Each is named, or left out if that is allowed; a file of which nothing is left is refused."""
    path = write(tmp_path, *"abcdefgh")
    with pytest.raises(TextError) as caught:
        check_file(path, tokenizer()).fitted(7)
    assert [n for n in range(20) if f"in.jsonl:{n}: " in str(caught.value)] == [13, 15]
    assert "--truncate" in str(caught.value)

    file = check_file(path, tokenizer(), skip=True).fitted(7)
    assert [t.id for t in file.read()] == list("abcdef")
    assert len(file.mistakes) == 2
    with pytest.raises(TextError, match="holds no text; every line is wrong"):
        check_file(path, tokenizer(), skip=True).fitted(1)
