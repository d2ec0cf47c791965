"""Benchmark rows become prompts, pairs and tasks with tests."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.clamp_texts import code_prompts, humaneval, mbpp, write
from saeguard.effect.prompts import read_prompts

ADD = "def add(a, b):\n    return a + b"


def test_a_reference_solution_gives_tests(tmp_path: Path) -> None:
    """They hold for the reference, name its function, and differ in their results."""
    path = _lines(tmp_path, {"id": "1", "prompt": "Add.", "completion": ADD, "template": "t"})
    (row,) = mbpp(path)
    assert row["prompt"].startswith("Add.\nName it add(a, b).")
    assert len(row["tests"]) == len(set(row["tests"])) > 1
    assert all(test.startswith("assert add(") for test in row["tests"])


def test_a_reference_without_behaviour_is_left_out(tmp_path: Path) -> None:
    """One that returns nothing, or something else each time, or no function at all."""
    codes = (
        "def f(x):\n    print(x)",
        "import random\ndef f(x):\n    return random.random()",
        "x = 1",
        "def f(x:",
    )
    rows = [
        {"id": str(i), "prompt": "Do.", "completion": code, "template": "t"}
        for i, code in enumerate(codes)
    ]
    assert list(mbpp(_lines(tmp_path, *rows))) == []


def test_examples_of_a_docstring_are_tests(tmp_path: Path) -> None:
    """Those whose result is a literal; a task whose reference fails them is left out."""
    prompt = 'def inc(x):\n    """Add 1.\n\n    >>> inc(1)\n    2\n    """\n'
    good = {"id": "1", "prompt": prompt, "completion": "    return x + 1", "template": "t"}
    bad = {"id": "2", "prompt": prompt, "completion": "    return x", "template": "t"}
    (row,) = humaneval(_lines(tmp_path, good, bad))
    assert row["id"] == "1"
    assert row["tests"] == ["assert (inc(1)) == (2)"]


def test_prompts_for_code_are_for_python_and_one_of_a_template(tmp_path: Path) -> None:
    """Prompts of other languages and further mutations of a task are left out."""
    for name in ("cyberseceval", "securityeval", "seccodeplt"):
        rows = [
            {"id": f"{name}/{i}", "prompt": f"p{i}", "kind": kind, "template": template}
            for i, (kind, template) in enumerate(
                [("python/cwe-1", "a"), ("c/cwe-1", "b"), ("python/cwe-1", "a")]
            )
        ]
        _lines(tmp_path, *rows, name=f"{name}.jsonl")
    found = [row["id"] for row in code_prompts(tmp_path)]
    assert found == ["cyberseceval/0", "securityeval/0", "seccodeplt/0"]


def test_a_template_is_in_one_half(tmp_path: Path) -> None:
    """Both halves together are all rows, and what is written can be read."""
    rows = [{"id": str(i), "prompt": "p", "template": f"t{i % 7}"} for i in range(40)]
    write(tmp_path / "made", rows)
    search, test, both = (
        read_prompts(tmp_path / f"made{half}.jsonl") for half in (".search", ".test", "")
    )
    assert not {p.template for p in search} & {p.template for p in test}
    assert len(search) + len(test) == len(both) == 40


def _lines(folder: Path, *rows: object, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
