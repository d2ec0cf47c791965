"""Labelled texts are cut by template, and what judges is never learnt from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.behaviour_texts import LONGEST, files, part_of, read, some


def _rows(count: int) -> list[dict[str, Any]]:
    return [
        {"id": f"{t}/{label}", "label": label, "template": str(t), "text": "a"}
        for t in range(count)
        for label in (0, 1)
    ]


def test_parts_share_no_template() -> None:
    """A template's rows lie in one part, whichever dataset holds them."""
    found = files("deception", "lie", {"a": _rows(200), "b": _rows(100)}, [])
    learn = {row["template"] for row in found["learn/lie/deception/lie.jsonl"]}
    twins = {row["template"] for row in found["twins/lie/lie.jsonl"]}
    judged = {
        row["template"]
        for dataset in ("a", "b")
        for row in found[f"evaluation/deception/lie/{dataset}.jsonl"]
    }
    assert learn
    assert twins
    assert judged
    assert not learn & twins
    assert not judged & (learn | twins)


def test_a_topic_is_all_labelled_texts_beside_ordinary_ones() -> None:
    """Both labels are the topic; no text that judges is among them."""
    ordinary = [{"id": "o", "label": 0, "template": "o", "text": "b"}]
    found = files("deception", "lie", {"a": _rows(50)}, ordinary)
    topic = found["topic/lie/deception/lie_topic.jsonl"]
    assert [row["label"] for row in topic[:-1]] == [1] * (len(topic) - 1)
    assert topic[-1] == ordinary[0]
    assert {part_of(row) for row in topic[:-1]} == {"learn"}


def test_few_rows_are_whole_templates() -> None:
    """A template is taken with all of its rows, or not at all."""
    chosen = some(_rows(50), 11)
    assert len(chosen) == 12
    assert all(sum(r["template"] == row["template"] for r in chosen) == 2 for row in chosen)


def test_long_texts_are_left_out(tmp_path: Path) -> None:
    """A prompt becomes a chat; a text that is too long is no row."""
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": "p", "completion": "c"}, {"text": "x" * (LONGEST + 1)}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(path) == [
        {"prompt": [{"role": "user", "content": "p"}], "completion": "c"},
    ]
