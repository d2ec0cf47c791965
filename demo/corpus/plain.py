"""Ordinary text that is already on the machine, under free licences, split into passages."""

from __future__ import annotations

import importlib
import random
import sysconfig
from contextlib import suppress
from pathlib import Path

# Not source anybody would learn from: tests, tables, generated code, bundled third parties.
_SKIP = {
    "test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "encodings",
    "pydoc_data", "turtledemo", "msilib", "__pycache__", "ensurepip", "_pyrepl",
}  # fmt: skip
LICENCES = Path("/usr/share/common-licenses")


def stdlib_sources() -> list[Path]:
    """Source files of the running Python's standard library (PSF licence)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(root.rglob("*.py"))
    return [f for f in files if not _SKIP.intersection(f.relative_to(root).parts)]


def _passages(text: str, size: int) -> list[str]:
    """Blank-line separated blocks of *text*, packed into passages of about *size* characters."""
    out: list[str] = []
    now = ""
    for block in text.replace("\t", "    ").split("\n\n"):
        if not block.strip() or not block.isascii() or len(block) > 4 * size:
            continue
        if now and len(now) + len(block) > size:
            out.append(now)
            now = ""
        now = f"{now}\n\n{block}" if now else block
    return [*out, now] if now else out


def python_passages(rng: random.Random, limit: int) -> list[str]:
    """About *limit* characters of standard library source."""
    out: list[str] = []
    files = stdlib_sources()
    rng.shuffle(files)
    for file in files:
        text = file.read_text(encoding="utf-8", errors="ignore")
        if len(text) < 60_000:
            out += _passages(text, 900)
    rng.shuffle(out)
    return _cut(out, limit)


def english_passages(rng: random.Random, limit: int) -> list[str]:
    """About *limit* characters of prose: Python's own documentation topics, and licence texts."""
    out: list[str] = []
    with suppress(ImportError):  # some distributions leave it out
        topics = importlib.import_module("pydoc_data.topics").topics
        for text in topics.values():
            out += _passages(text, 700)
    if LICENCES.is_dir():
        for file in sorted(p for p in LICENCES.iterdir() if p.is_file() and not p.is_symlink()):
            out += _passages(file.read_text(encoding="utf-8", errors="ignore"), 700)
    rng.shuffle(out)
    return _cut(out, limit)


def _cut(passages: list[str], limit: int) -> list[str]:
    total = 0
    for i, passage in enumerate(passages):
        total += len(passage)
        if total > limit:
            return passages[: i + 1]
    return passages
