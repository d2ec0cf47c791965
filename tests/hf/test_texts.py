"""Texts are tokenised as a server would, and bad lines are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from saeguard.hf.text_lines import read_lines
from saeguard.hf.text_rows import TextError
from saeguard.hf.texts import read_texts
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


def _texts(folder: Path, name: str, content: str | bytes) -> list[tuple[str, str, str]]:
    """Return id, prompt and output of each text of a file."""
    t, file = tokenizer(), folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [
        (
            text.id,
            t.decode(text.tokens[: text.prompt_tokens]),
            t.decode(text.tokens[text.prompt_tokens :]),
        )
        for text in read_texts(file, t)
    ]


class TestForms:
    """What tools export is read as it is."""

    CHAT = f"{BOS}user:Hi<|end|>assistant:"

    def test_messages(self, tmp_path: Path) -> None:
        """`messages` are a chat; the assistant's last one is the output, unless one is given."""
        hi, yes = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}
        assert _decoded(tmp_path, messages=[hi]) == (self.CHAT, "")
        assert _decoded(tmp_path, messages=[hi], completion="No") == (self.CHAT, "No")
        assert _decoded(tmp_path, messages=[hi, yes]) == (self.CHAT, "Yes")
        assert _decoded(tmp_path, messages=[hi, yes], completion="No") == (
            f"{BOS}user:Hi<|end|>assistant:Yes<|end|>assistant:",
            "No",
        )

    def test_integer_ids(self, tmp_path: Path) -> None:
        """A database's numbers are ids; two spellings of one are the same id."""
        lines = '{"id": 7, "text": "x"}\n{"id": 8, "text": "y"}\n'
        assert [id_ for id_, _, _ in _texts(tmp_path, "in.jsonl", lines)] == ["7", "8"]
        with pytest.raises(TextError, match="id: '7' is already on line 1"):
            _texts(tmp_path, "in.jsonl", lines + '{"id": "7", "text": "z"}\n')
        with pytest.raises(TextError, match="id: Input should be a valid string"):
            _texts(tmp_path, "in.jsonl", '{"id": true, "text": "z"}\n')

    def test_a_byte_order_mark(self, tmp_path: Path) -> None:
        """Files saved on Windows are read; UTF-16 is named."""
        line = '{"id": "a", "text": "x"}\r\n'
        assert _texts(tmp_path, "in.jsonl", "\ufeff" + line) == [("a", BOS, "x")]
        assert _texts(tmp_path, "in.csv", "\ufeffid,text\r\na,x\r\n") == [("a", BOS, "x")]
        with pytest.raises(TextError, match="found UTF-16, expected UTF-8"):
            _texts(tmp_path, "in.jsonl", line.encode("utf-16"))

    def test_csv(self, tmp_path: Path) -> None:
        """Cells are texts: quoted commas and line ends, leading zeros, empty cells, a chat."""
        found = _texts(
            tmp_path,
            "in.csv",
            "id,prompt,completion,messages,label\n"
            '007,1+1=,"2, or\n""two""",,1\n'
            '8,,,"[{""role"": ""user"", ""content"": ""Hi""}]",\n',
        )
        assert found == [("007", f"{BOS}1+1=", '2, or\n"two"'), ("8", self.CHAT, "")]

    def test_parquet(self, tmp_path: Path) -> None:
        """Columns of lists and null, as `datasets` writes them."""
        pa = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        chat = [{"role": "user", "content": "Hi", "name": None}]
        rows = [
            {"id": 1, "text": "x", "messages": None},
            {"id": 2, "text": None, "messages": chat},
        ]
        sink = pa.BufferOutputStream()
        parquet.write_table(pa.Table.from_pylist(rows), sink)
        content = sink.getvalue().to_pybytes()
        assert _texts(tmp_path, "in.parquet", content) == [("1", BOS, "x"), ("2", self.CHAT, "")]
        with pytest.raises(TextError, match="not Parquet"):
            _texts(tmp_path, "in.parquet", content[:-5])

    @pytest.mark.parametrize(
        ("name", "content", "says"),
        [
            ("in.jsonl", "id,text\na,x\n", "if this is CSV, name the file NAME.csv"),
            ("in.jsonl", "[\n", "write one object a line, as `jq -c '.[]'` does"),
            ("in.csv", "name;text\n", "found the columns name;text; expected id, and text or"),
            ("in.csv", "id,text\na,x,y\n", "in.csv:2: found 3 cells, expected 2; put a text"),
            ("in.csv", 'id,text\na,"x\n', "not CSV"),
            ("in.csv", "id,messages\na,Hi\n", "in.csv:2: messages: not JSON"),
        ],
    )
    def test_wrong_forms(self, tmp_path: Path, name: str, content: str, says: str) -> None:
        """A wrong form is told with what to do, in no language of Python's."""
        with pytest.raises(TextError) as caught:
            _texts(tmp_path, name, content)
        assert says in str(caught.value)


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    """Each wrong line is named, whatever is wrong with it; very many are counted."""
    lines = ["{", {"id": "a", "text": "x"}, {"id": "b"}, {"id": "a", "text": "y"}]
    lines += [{"id": "c", "text": "y" * 300}, b"\xe9".decode("latin-1")]
    file = _write(tmp_path, *lines)
    for read, wrong in (
        (lambda: read_texts(file, tokenizer()), [1, 3, 4, 5, 6]),
        (lambda: list(read_lines(file)), [1, 3, 4, 6]),  # which counts no tokens
    ):
        with pytest.raises(TextError) as caught:
            read()
        assert [n for n in range(1, 7) if f"in.jsonl:{n}: " in str(caught.value)] == wrong
    with pytest.raises(TextError) as caught:
        read_texts(_write(tmp_path, *["{"] * 50), tokenizer())
    assert "in.jsonl: 30 more of them\n" in str(caught.value)
    assert str(caught.value).endswith("in.jsonl: 50 lines are wrong")


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
