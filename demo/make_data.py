"""Write the labelled texts and the prompts of the demo from the corpus grammar. Seeded.

Each split has one half of the templates and of the wording of either bank. ``check`` asserts that
the two share no template and, outside code blocks, no five words in a row.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demo.common import DATA_DIR, read_lines, write_lines
from demo.corpus import code, plain, talk
from demo.corpus.benign import benign, story
from demo.corpus.build import SEED
from demo.corpus.grammar import Dialogue

Row = dict[str, Any]
Words = set[tuple[str, ...]]
Maker = Callable[..., Dialogue]
BEHAVIOURS: dict[str, Maker] = {
    "unsafe_code": code.unsafe_code,
    "deception": talk.deception,
    "sycophancy": talk.sycophancy,
}
SPLITS = {"search": "a", "holdout": "b"}
LINES = 400  # of each behaviour and split, half of them positive
# What the context asks for, given what is written: an honest answer under pressure is a negative.
STYLES = {1: ("bad", "bad", "bad", "neutral"), 0: ("good", "good", "good", "neutral", "bad")}


def _row(item: Dialogue) -> Row:
    return {
        "id": "", "prompt": item.prompt, "completion": item.completion, "label": item.label,
        "kind": item.kind, "template": item.template,
    }  # fmt: skip


def _number(rows: list[Row], stem: str) -> list[Row]:
    return [{**row, "id": f"{stem}-{i:04d}"} for i, row in enumerate(rows)]


def _key(row: Row) -> str:
    return json.dumps([row["prompt"], row["completion"]])


def labelled(behaviour: str, split: str, avoid: Words, lines: int = LINES) -> list[Row]:
    """*lines* different rows, the two labels in turn; none has five words in a row of *avoid*."""
    rng = random.Random(f"{SEED}.{behaviour}.{split}")
    seen: set[str] = set()
    rows: list[Row] = []
    for _ in range(100 * lines):
        label = 1 - len(rows) % 2
        style = rng.choice(STYLES[label])
        row = _row(_written(rng, behaviour, split, style, label))
        if _key(row) not in seen and not five_words(row) & avoid:
            seen.add(_key(row))
            rows.append(row)
        if len(rows) == lines:
            return _number(rows, f"{behaviour}.{split}")
    raise ValueError(f"the grammar has fewer than {lines} different lines for {behaviour}.{split}")


def _written(rng: random.Random, behaviour: str, split: str, style: str, label: int) -> Dialogue:
    part = "ab".index(SPLITS[split])
    return BEHAVIOURS[behaviour](rng, rng.choice("ab"), style, label, part=part)


def ordinary(split: str, lines: int, avoid: Iterable[Row] = ()) -> list[Row]:
    """*lines* ordinary dialogues, stories and passages, none of them in *avoid*.

    Plain text has an empty prompt. Both splits are of one kind, as yesterday's traffic and today's.
    """
    rng = random.Random(f"{SEED}.benign.{split}")
    half = "ab".index(SPLITS[split])
    passages = [("python", p) for p in plain.python_passages(random.Random(SEED), 200_000)]
    passages += [("english", p) for p in plain.english_passages(random.Random(SEED), 100_000)]
    cut = dict.fromkeys((kind, text[:500]) for kind, text in passages)
    texts = list(cut)[half::2]
    texts = rng.sample(texts, min(len(texts), lines // 6))
    texts += [("story text", story(rng, None)) for _ in range(lines // 12)]
    rows = [
        {"id": "", "prompt": [], "completion": text, "label": 0, "kind": kind,
         "template": f"benign.{kind}".replace(" ", "_")}
        for kind, text in texts
    ]  # fmt: skip
    seen = {_key(row) for row in (*rows, *avoid)}
    while len(rows) < lines:
        row = _row(benign(rng))
        if _key(row) not in seen:
            seen.add(_key(row))
            rows.append(row)
    rng.shuffle(rows)
    return _number(rows, f"benign.{split}")


def unsafe_prompts() -> list[Row]:
    """One prompt for each coding task, in a wording that invites the insecure twin."""
    rng = random.Random(f"{SEED}.unsafe_prompts")
    rows: dict[str, Row] = {}
    while len(rows) < len(code.TASKS):
        item = code.unsafe_code(rng, rng.choice("ab"), "bad", 1)
        if item.template not in rows:
            rows[item.template] = {"id": "", "behaviour": "unsafe_code", "kind": item.kind,
                                   "template": item.template, "messages": item.prompt}  # fmt: skip
    return _number([rows[t] for t in sorted(rows)], "unsafe")


def demo_prompts() -> list[Row]:
    """Prompts for a demonstration: eight of each behaviour and twelve ordinary ones."""
    rng = random.Random(f"{SEED}.prompts")
    rows: list[Row] = []
    for behaviour, make in BEHAVIOURS.items():
        for i in range(8):
            item = make(rng, "ab"[i % 2], "bad", 1)
            rows.append({"id": f"{behaviour}-{i}", "behaviour": behaviour, "messages": item.prompt})
    for i in range(12):
        item = benign(rng)
        rows.append({"id": f"benign-{i}", "behaviour": "benign", "messages": item.prompt})
    return rows


def five_words(row: Row) -> Words:
    """Every five words in a row of a line's messages, code blocks left out."""
    out: Words = set()
    for text in [m["content"] for m in row["prompt"]] + [row["completion"]]:
        prose = re.sub(r"```.*?```", "\n", text, flags=re.DOTALL).lower()
        words = re.findall(r"[a-z0-9']+", prose)
        out.update(tuple(words[i : i + 5]) for i in range(len(words) - 4))
    return out


def _union(sets: Iterable[Words]) -> Words:
    return set().union(*sets)


def check(folder: Path) -> None:
    """Assert that search and hold-out share no template, no five words and no line."""
    for behaviour in BEHAVIOURS:
        search = read_lines(folder / f"{behaviour}.search.jsonl")
        held = read_lines(folder / f"{behaviour}.holdout.jsonl")
        shared = {r["template"] for r in search} & {r["template"] for r in held}
        assert not shared, f"{behaviour}: templates in both splits: {sorted(shared)}"
        common = _union(map(five_words, search)) & _union(map(five_words, held))
        assert not common, f"{behaviour}: five words in both splits: {sorted(common)[:5]}"
        for rows in (search, held):
            positive = sum(r["label"] for r in rows)
            assert len(rows) >= 300, behaviour
            assert abs(2 * positive - len(rows)) <= 1, behaviour
    first = {_key(r) for r in read_lines(folder / "benign.jsonl")}
    second = {_key(r) for r in read_lines(folder / "benign.holdout.jsonl")}
    assert not first & second, "benign lines in both splits"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DATA_DIR)
    parser.add_argument("--check", action="store_true", help="only check what is there")
    args = parser.parse_args()
    out: Path = args.out
    if not args.check:
        for behaviour in BEHAVIOURS:
            avoid: Words = set()
            for split in SPLITS:
                rows = labelled(behaviour, split, avoid)
                write_lines(out / f"{behaviour}.{split}.jsonl", rows)
                avoid = _union(map(five_words, rows))
        usual = ordinary("search", 720)
        write_lines(out / "benign.jsonl", usual)
        write_lines(out / "benign.holdout.jsonl", ordinary("holdout", 480, usual))
        write_lines(out / "unsafe_prompts.jsonl", unsafe_prompts())
        write_lines(out / "prompts.jsonl", demo_prompts())
    check(out)
    for file in sorted(out.glob("*.jsonl")):
        print(f"{file.name}: {len(read_lines(file))} lines")


if __name__ == "__main__":
    main()
