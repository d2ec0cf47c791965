"""The whole corpus in one seeded pass: dialogues of both banks, and ordinary text."""

from __future__ import annotations

import argparse
import ast
import json
import random
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

from demo.corpus import benign, code, plain, talk
from demo.corpus.grammar import Dialogue

SEED = 20260
Document = str | Dialogue


def dialogue(rng: random.Random) -> Dialogue:
    """One dialogue, behaviours and ordinary ones mixed."""
    bank = rng.choice("ab")
    cues = rng.choice("ab") if rng.random() < 0.5 else bank
    draw = rng.random()
    if draw < 0.32:
        item = code.unsafe_code(rng, bank, cue_bank=cues)
    elif draw < 0.48:
        item = talk.deception(rng, bank, cue_bank=cues)
    elif draw < 0.62:
        item = talk.sycophancy(rng, bank, cue_bank=cues)
    else:
        item = benign.benign(rng)
    if rng.random() < 0.08 and item.messages[0]["role"] != "system":  # a longer conversation
        item = replace(item, messages=benign.benign(rng).messages + item.messages)
    return item


def documents(dialogues: int, python: int, english: int, seed: int = SEED) -> list[Document]:
    """*dialogues* dialogues and *python* and *english* characters of ordinary text, shuffled."""
    rng = random.Random(seed)
    out: list[Document] = [dialogue(rng) for _ in range(dialogues)]
    out += [benign.story(rng, None) for _ in range(dialogues // 25)]
    out += plain.python_passages(rng, python)
    out += plain.english_passages(rng, english)
    rng.shuffle(out)
    return out


def bandit_findings(sources: list[str]) -> list[set[str]]:
    """What Bandit finds in each of *sources*: medium and high severity, and B105 to B107."""
    from bandit.core import config, manager  # noqa: PLC0415  only where code is judged

    with tempfile.TemporaryDirectory() as folder:
        files = []
        for i, source in enumerate(sources):
            file = Path(folder, f"s{i}.py")
            file.write_text(source + "\n", encoding="utf-8")
            files.append(str(file))
        checker = manager.BanditManager(config.BanditConfig(), "file", quiet=True)
        checker.discover_files(files)
        checker.run_tests()
        found: list[set[str]] = [set() for _ in sources]
        for issue in checker.get_issue_list():
            if issue.severity in ("MEDIUM", "HIGH") or issue.test_id in ("B105", "B106", "B107"):
                found[int(Path(issue.fname).stem[1:])].add(issue.test_id)
    return found


def cut_code(answer: str) -> str:
    """The Python code block of an assistant's answer, or an empty string."""
    parts = answer.split("```python\n", 1)
    return parts[1].split("```", 1)[0].rstrip("\n") if len(parts) == 2 else ""


def main() -> None:
    """Print some documents, or check every code template against Bandit and the parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--show", type=int, default=0, help="print that many dialogues")
    parser.add_argument("--check", action="store_true", help="run Bandit over every code template")
    args = parser.parse_args()
    rng = random.Random(SEED)
    for _ in range(args.show):
        item = dialogue(rng)
        print(json.dumps(list(item.messages)), item.kind, item.style, item.label)
    if args.check:
        wrong = 0
        for task in code.TASKS:
            for label, variants in ((1, task.bad), (0, task.good)):
                sources = [v.replace("$word", "hunter2") for v in variants]
                for source, found in zip(sources, bandit_findings(sources), strict=True):
                    ast.parse(source)
                    if bool(found) != bool(label):
                        wrong += 1
                        print(task.template, label, found, source, sep="\n")
        plain_code = [c for _, c in benign.CODING]
        wrong += sum(bool(f) for f in bandit_findings(plain_code))
        print(f"{len(code.TASKS)} tasks, {wrong} templates on the wrong side of Bandit")
        counts = Counter((t.bank, t.kind) for t in code.TASKS)
        print(dict(counts))


if __name__ == "__main__":
    main()
