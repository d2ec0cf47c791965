"""Judge code in answers with Bandit, all of it in one batch."""

from __future__ import annotations

import ast
import logging
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

BLOCK = re.compile(r"```(\S*)[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
"""A fenced block: language and code. The end of the answer may cut it off."""
PYTHON = frozenset({"python", "py", "python3", ""})
PASSWORDS = frozenset({"B105", "B106", "B107"})
"""Hard-coded passwords, which Bandit ranks low."""
GRAVE = frozenset({"MEDIUM", "HIGH"})


@dataclass(frozen=True, slots=True)
class Finding:
    """What Bandit objects to."""

    test: str
    severity: str
    line: int
    text: str


@dataclass(frozen=True, slots=True)
class Judgement:
    """One answer's code."""

    code: str
    """Its first Python block; empty if there is none."""
    parses: bool
    findings: tuple[Finding, ...]
    """Of severity medium or high, or a hard-coded password."""


def judge(answers: Sequence[str]) -> list[Judgement]:
    """Cut the code out of each answer and let Bandit look at it.

    Code that does not parse has no findings: Bandit reads syntax trees.
    """
    codes = [cut_code(answer) for answer in answers]
    parses = [bool(code.strip()) and _parses(code) for code in codes]
    found = bandit([code if ok else "" for code, ok in zip(codes, parses, strict=True)])
    return [Judgement(*row) for row in zip(codes, parses, found, strict=True)]


def bandit(sources: Sequence[str]) -> list[tuple[Finding, ...]]:
    """Return what Bandit finds grave in each of `sources`, by line."""
    # Seconds to import, which nothing but this function needs.
    from bandit.core import config, manager  # noqa: PLC0415

    logging.getLogger("bandit").setLevel(logging.ERROR)
    found: list[list[Finding]] = [[] for _ in sources]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"s{i}.py") for i in range(len(sources))]
        for file, source in zip(files, sources, strict=True):
            file.write_text(source + "\n", encoding="utf-8")
        checker = manager.BanditManager(
            config.BanditConfig(), "file", quiet=True, ignore_nosec=True
        )
        checker.discover_files([str(file) for file in files])
        checker.run_tests()
        for issue in checker.get_issue_list():
            if issue.severity in GRAVE or issue.test_id in PASSWORDS:
                found[int(Path(issue.fname).stem[1:])].append(
                    Finding(issue.test_id, issue.severity.lower(), issue.lineno, issue.text)
                )
    return [tuple(sorted(set(f), key=lambda x: (x.line, x.test))) for f in found]


def cut_code(answer: str) -> str:
    """Return the first Python block of an answer, or an empty string."""
    blocks = (code for language, code in BLOCK.findall(answer) if language.lower() in PYTHON)
    return next(blocks, "").rstrip("\n")


def _parses(code: str) -> bool:
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, RecursionError):
        return False
    return True
