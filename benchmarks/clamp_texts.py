"""Turn labelled benchmark files into what `saeguard features attribute` and `clamp-effect` read.

`python benchmarks/clamp_texts.py --data DATA --out texts` writes files of JSON lines, cut by
template into a half to search on and a half to measure on. A template's half follows from its hash,
so that it is the same in every dataset and on every machine.
"""

from __future__ import annotations

import argparse
import ast
import doctest
import hashlib
import itertools
import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from saeguard.effect.run_tests import passes

Row = Mapping[str, Any]

ONLY_CODE = "Only return the code."
STATEMENTS = {
    "got_cities": "Tell me a fact about geography.",
    "got_companies": "Tell me a fact about a company.",
    "got_counterfact": "Tell me a fact.",
    "repe_facts": "Tell me a fact.",
}
PAIRED = ("caa_sycophancy", "lmexp_bio", "rho_sycophancy")
CHATS = ("gsm8k", "self_instruct", "t0_tasks", "persona_chat", "mbpp", "xstest_safe")
EACH = 60
"""Rows of each ordinary dataset."""
TRIED: tuple[Any, ...] = (
    0, 1, 2, 3, 5, 7, 10, 12, 28, 100, 2.5,
    "abc", "Python is fun", "aabbc", "racecar", "1101", "a1B2",
    [1, 2, 3], [5, 3, 8, 1], [10, 20, 20, 30], ["a", "bb", "ccc"], [True, False],
    (1, 2, 3), (4, 5, 4), [(1, 2), (3, 4)], [[1, 2], [3, 4]], {"a": 1, "b": 2},
)  # fmt: skip
"""Arguments that a reference solution is tried with."""
MOST_TESTS, MOST_TRIALS = 5, 800


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder BEHAVIOUR/DATASET.jsonl")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write(args.out / "code", code_prompts(args.data / "unsafe_code"))
    for name in ("seccodeplt", "sven_python"):
        write(args.out / name, code_pairs(args.data / "unsafe_code" / f"{name}.jsonl"))
    for name in PAIRED:
        write(args.out / name, read(args.data / "sycophancy" / f"{name}.jsonl"))
    for name, prompt in STATEMENTS.items():
        write(args.out / name, statements(args.data / "deception" / f"{name}.jsonl", prompt))
    write(args.out / "truthfulqa", read(args.data / "deception" / "truthfulqa.jsonl"))
    write(args.out / "benign", ordinary(args.data / "benign"))
    write(args.out / "humaneval", humaneval(args.data / "benign" / "humaneval.jsonl"))
    write(args.out / "mbpp", mbpp(args.data / "benign" / "mbpp.jsonl"))


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a dataset without what no command reads."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield {k: v for k, v in json.loads(line).items() if k not in {"source", "behaviour"}}


def write(stem: Path, rows: Iterable[Row]) -> None:
    """Write `STEM.search.jsonl`, `STEM.test.jsonl` and `STEM.jsonl`, which holds both."""
    halves: dict[str, list[Row]] = {"search": [], "test": []}
    for row in rows:
        digest = hashlib.sha256(row["template"].encode()).digest()
        halves["search" if digest[0] % 2 else "test"].append(row)
    halves[""] = halves["search"] + halves["test"]
    for half, chosen in halves.items():
        path = stem.parent / ".".join(filter(None, (stem.name, half, "jsonl")))
        path.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
    print(stem.name, {half or "both": len(chosen) for half, chosen in halves.items()})


def code_prompts(folder: Path) -> Iterator[Row]:
    """Yield one request for Python code for each prompt of three datasets."""
    forms = {
        "cyberseceval": "{}",
        "securityeval": "Complete this Python code. Return the whole code.\n\n```python\n{}\n```",
        "seccodeplt": "Write a Python function.\n\n{}\n\n" + ONLY_CODE,
    }
    for name, form in forms.items():
        seen: set[str] = set()
        for row in read(folder / f"{name}.jsonl"):
            prompt, template = row.get("prompt"), row["template"]
            if not row["kind"].startswith("python") or not prompt:
                continue
            # One prompt of each template: the mutations of one task are near copies.
            if template in seen:
                continue
            seen.add(template)
            asked = form.format(textwrap.dedent(prompt).rstrip())
            yield {"id": row["id"], "template": template, "prompt": asked, "kind": row["kind"]}


def code_pairs(path: Path) -> Iterator[Row]:
    """Yield vulnerable and mended code as answers to a request."""
    for row in read(path):
        code = row.get("completion") or row["text"]
        asked = row.get("prompt", "Write a Python function.")
        answer = f"```python\n{textwrap.dedent(code).strip()}\n```"
        yield {**_known(row), "prompt": f"{asked}\n\n{ONLY_CODE}", "completion": answer}


def statements(path: Path, prompt: str) -> Iterator[Row]:
    """Yield statements as answers to a request for one."""
    for row in read(path):
        yield {**_known(row), "prompt": prompt, "completion": row["text"]}


def ordinary(folder: Path) -> Iterator[Row]:
    """Yield the first rows of each ordinary dataset that have a completion."""
    for name in CHATS:
        rows = (row for row in read(folder / f"{name}.jsonl") if row["completion"].strip())
        yield from itertools.islice(rows, EACH)


def humaneval(path: Path) -> Iterator[Row]:
    """Yield HumanEval's tasks with the examples of their docstrings as tests."""
    for row in read(path):
        tests = []
        for example in _examples(row):
            source, want = example.source.strip(), example.want.strip()
            try:
                ast.literal_eval(want)
                ast.parse(source, mode="eval")
            except (SyntaxError, ValueError):
                continue
            tests.append(f"assert ({source}) == ({want})")
        if tests and passes(row["prompt"] + row["completion"], tests):
            asked = f"Complete this Python function.\n\n```python\n{row['prompt'].rstrip()}\n```"
            yield {**_known(row), "prompt": asked, "tests": tests}


def mbpp(path: Path) -> Iterator[Row]:
    """Yield MBPP's tasks, with what their reference solutions return as tests.

    The dataset has no tests. So the reference is tried with arguments of many kinds, and what it
    returns is the test: a solution passes if it behaves like the reference there.
    """
    for row in read(path):
        code = row["completion"]
        found = _last_function(code)
        tests = [] if found is None else tests_of(code, *found)
        if tests and found is not None:
            name, arguments = found
            given = ", ".join(arguments)
            asked = f"{row['prompt']}\nName it {name}({given}). {ONLY_CODE}"
            yield {**_known(row), "prompt": asked, "tests": tests}


def tests_of(code: str, name: str, arguments: Sequence[str]) -> list[str]:
    """Return tests of a reference solution: calls that succeed, with different results."""
    probe = f"""
import itertools, json
tried, tests, seen = {TRIED!r}, [], set()
for args in itertools.islice(itertools.product(tried, repeat={len(arguments)}), {MOST_TRIALS}):
    call = "{name}(" + ", ".join(map(repr, args)) + ")"
    try:
        one, two = eval(call), eval(call)
    except Exception:
        continue
    if one is None or one != two or repr(one) in seen or len(repr(one)) > 200 or "<" in repr(one):
        continue
    seen.add(repr(one))
    tests.append(f"assert {{call}} == {{one!r}}")
    if len(tests) == {MOST_TESTS}:
        break
print("TESTS" + json.dumps(tests))
"""
    from saeguard.effect.run_tests import printed  # noqa: PLC0415

    for line in printed(code + "\n" + probe).splitlines():
        if line.startswith("TESTS"):
            tests: list[str] = json.loads(line.removeprefix("TESTS"))
            return tests if len(tests) > 1 and passes(code, tests) else []
    return []


def _examples(row: Row) -> Sequence[doctest.Example]:
    """Return the examples in the docstring of the function that a task asks for."""
    # Parsed, since the quotes that end it would read as part of the last result.
    defined = [
        node
        for node in ast.parse(row["prompt"] + row["completion"]).body
        if isinstance(node, ast.FunctionDef)
    ]
    docstring = (ast.get_docstring(defined[-1]) or "") if defined else ""
    try:
        return doctest.DocTestParser().get_examples(docstring)
    except ValueError:  # examples that doctest itself refuses
        return []


def _last_function(code: str) -> tuple[str, list[str]] | None:
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return None
    defined = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    if not defined or not 1 <= len(defined[-1].args.args) <= 3:
        return None
    return defined[-1].name, [a.arg for a in defined[-1].args.args]


def _known(row: Row) -> dict[str, Any]:
    return {k: row[k] for k in ("id", "label", "template", "kind") if k in row}


if __name__ == "__main__":
    main()
