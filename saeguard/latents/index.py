"""Look things up in an index of latents."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from saeguard.errors import InputError
from saeguard.latents.chunk import BINS
from saeguard.sae import SaeInfo


@dataclass(frozen=True, slots=True)
class Stats:
    """What one latent does on the corpus."""

    latent: int
    tokens: int
    """On which it fires."""
    texts: int
    """In which it fires."""
    density: float
    """Share of the tokens on which it fires."""
    mean: float | None
    """Where it fires; None if it is dead."""
    highest: float | None
    histogram: tuple[tuple[float, float, int], ...]
    """Lower and upper bound of the activation, and tokens."""

    @property
    def dead(self) -> bool:
        """Whether it fires on no token of the corpus."""
        return not self.tokens


@dataclass(frozen=True, slots=True)
class Example:
    """A text in which a latent fires, around its strongest token."""

    band: int
    place: int
    text: int
    at: int
    """Position of the strongest token."""
    value: float
    start: int
    """Position of the first token shown."""
    tokens: tuple[int, ...]
    fired: tuple[tuple[int, float], ...]
    """Positions at which the latent fires, among those shown, with its activations."""


@dataclass(frozen=True, slots=True)
class Company:
    """A latent that fires together with another."""

    latent: int
    together: int
    """Sampled tokens on which both fire."""
    tokens: int
    """Sampled tokens on which this one fires."""
    lift: float
    """Times as often as if they had nothing to do with each other."""


class Index:
    """An open index; read only, so that several processes may hold one."""

    def __init__(self, path: Path) -> None:
        """Open the index at `path`.

        Raises:
            InputError: there is none, or it is unfinished, or something else.
        """
        if not path.is_file():
            part = path.with_name(f"{path.name}.part")
            found = f"unfinished: go on with `saeguard features index --out {path} --resume`"
            raise InputError(
                f"{path}: the index is {found if part.is_dir() else 'not there'}; "
                "`saeguard features index` makes one"
            )
        self.path = path
        try:
            self._database = duckdb.connect(str(path), read_only=True)
            rows = self._database.execute("SELECT key, value FROM about").fetchall()
        except duckdb.Error as error:
            raise InputError(
                f"{path}: not an index of latents ({str(error).splitlines()[0]}); "
                "`saeguard features index` makes one"
            ) from error
        self.about: dict[str, Any] = {key: json.loads(value) for key, value in rows}

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def cursor(self) -> duckdb.DuckDBPyConnection:
        """Return a connection of the caller's own, to be closed."""
        return self._database.cursor()

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """Return the rows of a query; each call has a cursor of its own, so threads may call."""
        with self._database.cursor() as cursor:
            return cursor.execute(query, list(values)).fetchall()

    def columns(self, query: str, *values: Any) -> dict[str, np.ndarray]:
        """Return the columns of a query."""
        with self._database.cursor() as cursor:
            return cursor.execute(query, list(values)).fetchnumpy()

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return int(self.about["sae"]["d_sae"])

    @property
    def tokens(self) -> int:
        """Tokens of the corpus that were looked at."""
        return int(self.about["tokens"])

    def check_sae(self, info: SaeInfo) -> None:
        """Check that the index is of an SAE.

        Raises:
            InputError: it is of another one.
        """
        if info.sha256 != self.about["sae"]["sha256"]:
            raise InputError(
                f"{self.path}: the index is of the SAE with sha256 {self.about['sae']['sha256']}, "
                f"expected {info.sha256} ({info.weights}); make another with "
                "`saeguard features index`"
            )

    def check_latent(self, latent: int) -> None:
        """Check that there is a latent of this number.

        Raises:
            InputError: there is none.
        """
        if not 0 <= latent < self.d_sae:
            raise InputError(f"there is no latent {latent}; the SAE has 0 to {self.d_sae - 1}")

    def stats(self, latent: int) -> Stats:
        """Return what a latent does on the corpus.

        Raises:
            InputError: there is no such latent.
        """
        self.check_latent(latent)
        (row,) = self.rows("SELECT * FROM latent WHERE latent = ?", latent)
        number, tokens, texts, density, mean, highest, bins, counts = row
        histogram = tuple(
            (2 ** (b / BINS), 2 ** ((b + 1) / BINS), n) for b, n in zip(bins, counts, strict=True)
        )
        return Stats(number, tokens, texts, density, mean, highest, histogram)

    def examples(self, latent: int) -> list[Example]:
        """Return the texts that are shown of a latent, band by band, strongest first."""
        rows = self.rows("SELECT * FROM example WHERE latent = ? ORDER BY band, place", latent)
        return [
            Example(
                band,
                place,
                text,
                at,
                value,
                start,
                tuple(tokens),
                tuple(zip(fired_at, fired_value, strict=True)),
            )
            for _, band, place, text, at, value, start, tokens, fired_at, fired_value in rows
        ]

    def lens(self, latent: int) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
        """Return the tokens that a latent's decoder row makes likelier, and unlikelier."""
        ((up, up_value, down, down_value),) = self.rows(
            "SELECT up, up_value, down, down_value FROM lens WHERE latent = ?", latent
        )
        return (
            list(zip(self.pieces(up), up_value, strict=True)),
            list(zip(self.pieces(down), down_value, strict=True)),
        )

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """Return the text of each token."""
        return [self._pieces.get(token, "") for token in tokens]

    @cached_property
    def _pieces(self) -> dict[int, str]:
        return dict(self.rows("SELECT token, piece FROM piece"))

    def above(self, latents: Sequence[int], values: Sequence[float]) -> np.ndarray:
        """Return the share of the corpus's tokens on which each latent is about as strong, or more.

        Counted from the histogram, so the bin of the value counts as a whole.

        Args:
            latents: [n]
            values: [n] activations.
        """
        out = np.zeros(len(latents))
        if not len(latents):
            return out
        wanted = {"i": np.arange(len(latents)), "latent": np.array(latents, np.int64)}
        with self._database.cursor() as cursor:
            cursor.register("wanted", wanted)
            rows = cursor.execute(
                "SELECT i, bins, counts FROM wanted JOIN latent USING (latent)"
            ).fetchall()
        for i, bins, counts in rows:
            bin_ = np.floor(BINS * np.log2(max(values[i], 1e-30)))
            out[i] = sum(n for b, n in zip(bins, counts, strict=True) if b >= bin_)
        shares: np.ndarray = out / max(1, self.tokens)
        return shares

    def coactive(self, latent: int, *, least: int = 5, most: int = 20) -> list[Company]:
        """Return what fires on the same tokens as a latent, by lift.

        Counted on the sampled tokens: all of them if the corpus has at most 200,000.

        Args:
            latent: its number.
            least: leave out latents that fire together with it on fewer tokens.
            most: how many to return.

        Raises:
            InputError: there is no such latent.
        """
        self.check_latent(latent)
        rows = self.rows(
            """
            WITH own AS (SELECT text, pos FROM sample WHERE latent = ?),
                 shared AS (SELECT latent, count(*) AS together
                          FROM sample JOIN own USING (text, pos) GROUP BY latent
                          HAVING count(*) >= ?),
                 all_ AS (SELECT latent, count(*) AS tokens
                          FROM sample SEMI JOIN shared USING (latent) GROUP BY latent)
            SELECT latent, together, tokens,
                   together::DOUBLE * ? / (tokens * (SELECT count(*) FROM own)) AS lift
            FROM shared JOIN all_ USING (latent) WHERE latent <> ?
            ORDER BY lift DESC, together DESC, latent LIMIT ?
            """,
            latent, least, int(self.about["sampled"]), latent, most,
        )  # fmt: skip
        return [Company(*row) for row in rows]

    def search(self, words: str, most: int = 40) -> list[int]:
        """Return the latents whose likelier tokens hold the words, or whose number it is."""
        if words.strip().isdecimal() and int(words) < self.d_sae:
            return [int(words)]
        rows = self.rows(
            """
            WITH found AS (SELECT token FROM piece WHERE contains(lower(piece), lower(?)))
            SELECT latent FROM (SELECT latent, unnest(up) AS token, unnest(up_value) AS value
                                FROM lens) SEMI JOIN found USING (token)
            GROUP BY latent ORDER BY max(value) DESC, latent LIMIT ?
            """,
            words.strip(), most,
        )  # fmt: skip
        return [latent for (latent,) in rows]
