"""Scores that are kept while an evaluation runs, and between runs: one SQLite file.

Each row is keyed by the digest of what the model read, and of everything that its value depends
on. So a run that was cut off goes on, and a changed policy is judged anew while others are not.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from saeguard.evaluation.datasets import EvaluationError

VERSION = 1
TABLES = """
create table if not exists verdicts(text blob, key text, outcome text, score real, tokens int,
  evaluated int, primary key(text, key)) without rowid;
create table if not exists residuals(text blob, key text, pooled blob, primary key(text, key))
  without rowid;
create table if not exists answers(text blob, key text, score real, cut int,
  primary key(text, key)) without rowid;
"""
ASKED = 500
"""Texts of one query; SQLite bounds the parameters of a statement."""


class Kept(NamedTuple):
    """One policy's verdict on one text."""

    outcome: str
    score: float | None
    tokens: int
    evaluated: int


class Store:
    """The open file; each call of `commit` makes what was put before it permanent."""

    def __init__(self, path: Path) -> None:
        """Open or create the file.

        Raises:
            EvaluationError: it is something else, or of another version.
        """
        try:
            self._db = sqlite3.connect(path)
            (version,) = self._db.execute("pragma user_version").fetchone()
            tables = self._db.execute("select count(*) from sqlite_master").fetchone()[0]
            if version != VERSION and tables:
                raise EvaluationError(
                    f"--resume: {path}: found scores of version {version}, expected {VERSION}; "
                    "name another file"
                )
            self._db.executescript(f"pragma user_version={VERSION};{TABLES}")
        except sqlite3.DatabaseError as error:
            raise EvaluationError(
                f"--resume: {path}: {error}; expected a file of scores that `saeguard evaluate` "
                "wrote, or a new name"
            ) from error

    def close(self) -> None:
        """Close the file; what was not committed is lost."""
        self._db.close()

    def commit(self) -> None:
        """Make what was put permanent."""
        self._db.commit()

    def put_verdicts(self, rows: Iterable[tuple[bytes, str, Kept]]) -> None:
        """Keep verdicts by text and key."""
        self._db.executemany(
            "insert or replace into verdicts values (?, ?, ?, ?, ?, ?)",
            ((text, key, *kept) for text, key, kept in rows),
        )

    def verdicts(self, texts: Sequence[bytes], key: str) -> list[Kept | None]:
        """Return the verdict on each text, None where there is none."""
        found = {
            text: Kept(*rest)
            for text, *rest in self._rows(
                "outcome, score, tokens, evaluated", "verdicts", texts, key
            )
        }
        return [found.get(text) for text in texts]

    def put_residuals(self, rows: Iterable[tuple[bytes, str, np.ndarray]]) -> None:
        """Keep pooled residuals [2, d] by text and key."""
        self._db.executemany(
            "insert or replace into residuals values (?, ?, ?)",
            ((text, key, pooled.astype("<f4").tobytes()) for text, key, pooled in rows),
        )

    def residuals(self, texts: Sequence[bytes], key: str) -> list[np.ndarray | None]:
        """Return the pooled residuals of each text, [2, 0] if it has none, None if not kept."""
        found = {
            text: np.frombuffer(blob, "<f4").reshape(2, -1)
            for text, blob in self._rows("pooled", "residuals", texts, key)
        }
        return [found.get(text) for text in texts]

    def put_answers(self, rows: Iterable[tuple[bytes, str, float, bool]]) -> None:
        """Keep the model's answers by text and key."""
        self._db.executemany("insert or replace into answers values (?, ?, ?, ?)", rows)

    def answers(self, texts: Sequence[bytes], key: str) -> list[tuple[float, bool] | None]:
        """Return score, and whether the text was cut, for each text; None where there is none."""
        found = {
            text: (float(score), bool(cut))
            for text, score, cut in self._rows("score, cut", "answers", texts, key)
        }
        return [found.get(text) for text in texts]

    def _rows(
        self, columns: str, table: str, texts: Sequence[bytes], key: str
    ) -> Iterable[tuple[Any, ...]]:
        for start in range(0, len(texts), ASKED):
            some = texts[start : start + ASKED]
            marks = ",".join("?" * len(some))
            query = f"select text, {columns} from {table} where key = ? and text in ({marks})"  # noqa: S608 - names of ours, values by parameter
            with closing(self._db.execute(query, (key, *some))) as rows:
                yield from rows
