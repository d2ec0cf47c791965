"""Cut labelled public texts into those that the shipped set learns from and those that judge it.

`python benchmarks/behaviour_texts.py --data DATA --out texts` reads `BEHAVIOUR/DATASET.jsonl` and
writes, for each feature, texts to learn from, twins to set its threshold on, its topic beside
ordinary texts, and texts that only the evaluation sees. A template's part follows from its hash, so
that it is the same in every dataset and on every machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

Row: TypeAlias = Mapping[str, Any]
Part: TypeAlias = Literal["learn", "twins", "evaluation"]

LONGEST = 2500
"""Characters of a text; longer ones are left out."""
TOPIC = 300
"""Labelled texts that a topic is learnt from."""
DATASETS: dict[str, dict[str, int | None]] = {
    "deception/false_statement": {
        "got_cities": None, "got_companies": None, "repe_facts": None, "truthfulqa": 900,
    },
    "deception/lie": {"apollo_roleplay": None},
    "sycophancy/agreement": {"caa_sycophancy": 600},
    "sycophancy/flattery": {"lmexp_open": None, "lmexp_bio": 160},
    "unsafe_code/insecure_code": {"securityeval": None, "sven_python": 360, "seccodeplt": 300},
    "refusal/refusal": {"xstest_replies": 300},
    "jailbreak/unsafe_request": {"xstest_prompts": None},
    "power_seeking/power_seeking": {"advanced_risk": 400},
}  # fmt: skip
"""By BEHAVIOUR/FEATURE: datasets, and how many rows of each; None for all."""
ORDINARY = {
    "self_instruct": 223, "web_functions": 200, "mbpp": 200, "t0_tasks": 200, "gsm8k": 150,
    "persona_chat": 150, "library_functions": 120, "svamp": 80, "humaneval": 60,
}  # fmt: skip
FEW = frozenset({"unsafe_request"})
"""Features whose twins are learnt from, too: they have too few texts for a part of their own."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder BEHAVIOUR/DATASET.jsonl")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    ordinary = cut_ordinary(args.data / "benign")
    for part, rows in ordinary.items():
        write(args.out / f"ordinary_{part}" / "ordinary.jsonl", rows)
    for name, datasets in DATASETS.items():
        behaviour, feature = name.split("/")
        texts = {
            dataset: some(read(args.data / behaviour / f"{dataset}.jsonl"), count)
            for dataset, count in datasets.items()
        }
        for path, rows in files(behaviour, feature, texts, ordinary["topics"]).items():
            write(args.out / path, rows)


def files(
    behaviour: str, feature: str, texts: Mapping[str, Sequence[Row]], ordinary: Sequence[Row]
) -> dict[str, list[Row]]:
    """Return the rows of a feature's files, by path.

    Args:
        behaviour: of the feature.
        feature: its name.
        texts: rows by dataset.
        ordinary: ordinary texts, the negatives of a topic.
    """
    parts: dict[Part, list[Row]] = {"learn": [], "twins": [], "evaluation": []}
    found: dict[str, list[Row]] = {}
    for dataset, rows in texts.items():
        for row in rows:
            parts[part_of(row)].append(row)
        path = f"evaluation/{behaviour}/{feature}/{dataset}.jsonl"
        found[path] = [row for row in rows if part_of(row) == "evaluation"]
    topic = [{**row, "label": 1} for row in some(parts["learn"], TOPIC)]
    more = parts["twins"] if feature in FEW else []
    return found | {
        f"learn/{feature}/{behaviour}/{feature}.jsonl": [*parts["learn"], *more],
        f"twins/{feature}/{feature}.jsonl": [row for row in parts["twins"] if not row["label"]],
        f"topic/{feature}/{behaviour}/{feature}_topic.jsonl": [*topic, *ordinary],
    }


def part_of(row: Row) -> Part:
    """Return the part of a labelled row, which its template decides."""
    at = fraction(row["template"])
    return "learn" if at < 0.55 else "twins" if at < 0.75 else "evaluation"


def cut_ordinary(folder: Path) -> dict[str, list[Row]]:
    """Return ordinary texts to tell topics from, to set thresholds on, and to measure rates on."""
    parts: dict[str, list[Row]] = {"topics": [], "thresholds": [], "evaluation": []}
    for dataset, count in ORDINARY.items():
        for row in some(read(folder / f"{dataset}.jsonl"), count):
            at = fraction(row["template"])
            part = "topics" if at < 0.3 else "thresholds" if at < 0.65 else "evaluation"
            parts[part].append(row)
    return parts


def read(path: Path) -> list[Row]:
    """Return the rows of a file that are not too long, their prompts as chats."""
    rows = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if len(row.get("text") or row.get("completion") or "") > LONGEST:
                continue
            if isinstance(row.get("prompt"), str):
                row["prompt"] = [{"role": "user", "content": row["prompt"]}]
            rows.append(row)
    return rows


def some(rows: Sequence[Row], count: int | None) -> list[Row]:
    """Return about `count` rows, whole templates in the order of their hashes; None for all."""
    if count is None:
        return list(rows)
    of: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        of[row["template"]].append(row)
    chosen: list[Row] = []
    for template in sorted(of, key=lambda template: fraction("s" + template)):
        if len(chosen) >= count:
            break
        chosen += of[template]
    return chosen


def fraction(text: str) -> float:
    """Return a number from 0 up to 1 that follows from the text alone."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
