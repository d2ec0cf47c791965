"""Texts to train on: every form is read, and mistakes name file, line and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from saeguard.training.errors import TrainingError
from saeguard.training.texts import file_digest, read_chunks
from tests.tiny import chat_by_hand, tokenizer


def _lines(path: Path, *lines: Any) -> Path:
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return path


def _all(path: Path, context: int = 200) -> list[list[int]]:
    chunks = read_chunks([path], tokenizer(), context)
    return [chunks.chunk(i).tolist() for i in range(len(chunks))]


def test_forms(tmp_path: Path) -> None:
    """A text gets the tokenizer's prefix, a chat the template, a completion follows its prompt."""
    chat = [{"role": "user", "content": "hi"}]
    path = _lines(
        tmp_path / "a.jsonl",
        {"text": "abc", "id": 1},
        "",
        {"messages": chat},
        {"prompt": chat, "completion": "yo"},
        {"prompt": "ab", "completion": "c"},
    )
    read = tokenizer()
    texts = _all(path)
    plain = read("abc")["input_ids"]
    asked, _ = chat_by_hand([("user", "hi")])
    said = read("assistant:", add_special_tokens=False)["input_ids"]
    assert sorted(texts) == sorted(
        [
            plain,
            asked[: -len(said)],
            [*asked, *read("yo", add_special_tokens=False)["input_ids"]],
            plain,
        ]
    )


def test_plain_files_are_cut(tmp_path: Path) -> None:
    """A file that is not JSON lines is one text, cut at the context; a lone last token goes."""
    path = tmp_path / "code.py"
    path.write_text("x = 1\n" * 10)
    chunks = read_chunks([path], tokenizer(), 30)
    assert [len(chunks.chunk(i)) for i in range(len(chunks))] == [30, 30]  # and BOS makes 61
    assert chunks.texts == 1
    assert chunks.files == {str(path): file_digest(path)}


def test_order(tmp_path: Path) -> None:
    """Each epoch has every chunk once, in an order of its own that the seed decides."""
    path = _lines(tmp_path / "a.jsonl", *({"text": f"text {i}"} for i in range(20)))
    chunks = read_chunks([path], tokenizer(), 100)
    first, second = ([tuple(chunks.shuffled(e * 20 + i, 0)) for i in range(20)] for e in range(2))
    assert sorted(first) == sorted(second)
    assert first != second
    assert first == [tuple(chunks.shuffled(i, 0)) for i in range(20)]
    assert first != [tuple(chunks.shuffled(i, 1)) for i in range(20)]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "a.jsonl:2: not JSON"),
        ("7", "a.jsonl:2: line: Input should be"),
        ({}, "a.jsonl:2: line: expected one of `text`, `messages` and `prompt`, found none"),
        ({"text": "a", "prompt": "b"}, "a.jsonl:2: line: expected one of"),
        ({"text": "a", "completion": "b"}, "a.jsonl:2: line: `completion` goes with `prompt`"),
        ({"text": 7}, "a.jsonl:2: text: Input should be a valid string"),
        ({"messages": [{"role": "user"}]}, "a.jsonl:2: messages.0.content: Field required"),
    ],
)
def test_bad_lines(tmp_path: Path, line: Any, says: str) -> None:
    """The message names file, line and field."""
    path = _lines(tmp_path / "a.jsonl", {"text": "fine"}, line)
    with pytest.raises(TrainingError) as raised:
        read_chunks([path], tokenizer(), 100)
    assert str(tmp_path / says) in str(raised.value)


def test_a_template_that_refuses(tmp_path: Path) -> None:
    """What the chat template says of a chat is reported with its line."""
    read = tokenizer()
    read.chat_template = "{{ raise_exception('roles must alternate') }}"
    path = _lines(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "x"}]})
    with pytest.raises(TrainingError, match=r"a\.jsonl:1: messages: roles must alternate"):
        read_chunks([path], read, 100)


def test_files_that_are_no_texts(tmp_path: Path) -> None:
    """A file that is missing, not UTF-8 or empty is named."""
    with pytest.raises(TrainingError, match=r"gone: No such file"):
        read_chunks([tmp_path / "gone"], tokenizer(), 100)
    (tmp_path / "binary").write_bytes(b"ab\xff")
    with pytest.raises(TrainingError, match=r"binary: byte 2: not UTF-8"):
        read_chunks([tmp_path / "binary"], tokenizer(), 100)
    (tmp_path / "empty").write_text("")
    with pytest.raises(TrainingError, match=r"empty: no text with two tokens"):
        read_chunks([tmp_path / "empty"], tokenizer(), 100)
