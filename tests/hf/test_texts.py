"""Texts are tokenised as a server would, and bad lines are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from saeguard.hf.texts import TextError, read_texts
from tests.tiny import BOS, tokenizer


def _write(folder: Path, *lines: Any) -> Path:
    file = folder / "in.jsonl"
    file.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")
    return file


def _decoded(folder: Path, **line: Any) -> tuple[str, str]:
    t = tokenizer()
    (text,) = read_texts(_write(folder, {"id": "x", **line}), t)
    cut = text.prompt_tokens
    return t.decode(text.tokens[:cut]), t.decode(text.tokens[cut:])


class TestTokenises:
    """Prompt and completion meet where generation starts."""

    def test_chat(self, tmp_path: Path) -> None:
        """Messages go through the chat template, with one BOS and the generation prompt."""
        prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
        assert _decoded(tmp_path, prompt=prompt, completion="Hello") == (
            f"{BOS}system:Be kind.<|end|>user:Hi<|end|>assistant:",
            "Hello",
        )

    def test_string_prompt(self, tmp_path: Path) -> None:
        """A string prompt gets the tokenizer's own BOS."""
        assert _decoded(tmp_path, prompt="1+1=", completion="2") == (f"{BOS}1+1=", "2")

    def test_bos_is_not_doubled(self, tmp_path: Path) -> None:
        """A prompt that spells out BOS keeps one."""
        assert _decoded(tmp_path, prompt=f"{BOS}1+1=") == (f"{BOS}1+1=", "")
        assert _decoded(tmp_path, text=f"{BOS}def f") == ("", f"{BOS}def f")

    @pytest.mark.parametrize("form", [{"text": "def f"}, {"prompt": [], "completion": "def f"}])
    def test_text_is_output(self, tmp_path: Path, form: dict[str, Any]) -> None:
        """A plain text follows BOS and counts as output."""
        assert _decoded(tmp_path, **form) == (BOS, "def f")

    def test_labels(self, tmp_path: Path) -> None:
        """Label, kind and template are kept; a text without a template is its own."""
        file = _write(
            tmp_path,
            {"id": "a", "text": "x", "label": 1, "kind": "k", "template": "t"},
            {"id": "b", "text": "y", "note": "ignored"},
        )
        a, b = read_texts(file, tokenizer())
        assert (a.label, a.kind, a.template) == (1, "k", "t")
        assert (b.label, b.kind, b.template) == (0, "", "b")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "line: Input should be a valid dictionary"),
        ({"text": "x"}, "id: Field required"),
        ({"id": "", "text": "x"}, "id: String should have at least 1"),
        ({"id": "x"}, "line: give either"),
        ({"id": "x", "text": "x", "prompt": "y"}, "line: give either"),
        ({"id": "x", "text": "x", "completion": "y"}, "goes with `prompt`"),
        ({"id": "x", "text": "x", "label": 2}, "label: Input should be 0 or 1"),
        ({"id": "x", "prompt": [{"role": "user"}]}, "content: Field required"),
        ({"id": "x", "text": 5}, "text: Input should be a valid string"),
        ({"id": "x", "text": "y" * 300}, "301 tokens; the model takes 256"),
        ({"id": "first", "text": "x"}, "'first' is already on line 1"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: Any, says: str) -> None:
    """Each mistake names the file, the line and the field."""
    file = _write(tmp_path, {"id": "first", "text": "fine"}, "", line)
    with pytest.raises(TextError, match=says) as caught:
        read_texts(file, tokenizer())
    assert str(caught.value).startswith(f"{file}:3: ")


def test_missing_and_binary_files(tmp_path: Path) -> None:
    """A file that is missing or not text is refused by name."""
    with pytest.raises(TextError, match=r"none\.jsonl"):
        read_texts(tmp_path / "none.jsonl", tokenizer())
    (tmp_path / "in.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TextError, match=r"in\.jsonl"):
        read_texts(tmp_path / "in.jsonl", tokenizer())
