"""Put the chunks of an index together: statistics of each latent, texts to show, the logit lens."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from saeguard.hf.model import LanguageModel
from saeguard.latents.bands import choose
from saeguard.latents.chunk import all_files
from saeguard.latents.logit_lens import Lens, logit_lens
from saeguard.sae import SaeInfo

LATENTS = 512
"""Latents whose peaks are in memory at once."""
AROUND = 32
"""Tokens shown on each side of the strongest one."""
SAMPLED = 200_000
"""Tokens of which everything that fired is kept, for what fires together."""
MEMORY = "2GB"
"""Of DuckDB; beyond it, it uses the disk."""

_TABLES = """
CREATE TABLE about (key VARCHAR, value VARCHAR);
CREATE TABLE text (text INTEGER, id VARCHAR, label INTEGER, kind VARCHAR, prompt_tokens INTEGER,
    tokens INTEGER[]);
CREATE TABLE piece (token INTEGER, piece VARCHAR);
CREATE TABLE lens (latent INTEGER, up INTEGER[], up_value FLOAT[], down INTEGER[],
    down_value FLOAT[]);
CREATE TABLE example (latent INTEGER, band INTEGER, place INTEGER, text INTEGER, pos INTEGER,
    value FLOAT, start INTEGER, tokens INTEGER[], fired_at INTEGER[], fired_value FLOAT[]);
"""
_LATENT = """
CREATE TABLE latent AS
WITH bins AS (SELECT latent, bin, sum(tokens)::BIGINT AS tokens, sum(total) AS total
              FROM {bin} GROUP BY latent, bin),
     sums AS (SELECT latent, sum(tokens)::BIGINT AS tokens, sum(total) AS total,
                     list(bin ORDER BY bin) AS bins, list(tokens ORDER BY bin) AS counts
              FROM bins GROUP BY latent),
     highest AS (SELECT latent, count(*) AS texts, max(value) AS highest
                 FROM {peak} GROUP BY latent)
SELECT i::INTEGER AS latent, coalesce(sums.tokens, 0) AS tokens, coalesce(texts, 0) AS texts,
       coalesce(sums.tokens, 0) / ? AS density, sums.total / sums.tokens AS mean, highest,
       coalesce(bins, []) AS bins, coalesce(counts, []) AS counts
FROM range(?) AS numbers(i)
     LEFT JOIN sums ON sums.latent = i LEFT JOIN highest ON highest.latent = i
ORDER BY i
"""
_EXAMPLES = """
INSERT INTO example
SELECT c.latent, c.band, c.place, c.text, c.pos, c.value, greatest(c.pos - {around}, 0) AS start,
       any_value(t.tokens[greatest(c.pos - {around}, 0) + 1 : c.pos + {around} + 1]),
       list(f.pos ORDER BY f.pos), list(f.value ORDER BY f.pos)
FROM chosen c JOIN text t USING (text)
     JOIN {fired} f ON f.latent = c.latent AND f.text = c.text
          AND f.pos BETWEEN c.pos - {around} AND c.pos + {around}
WHERE f.latent >= ? AND f.latent < ?
GROUP BY c.latent, c.band, c.place, c.text, c.pos, c.value
ORDER BY c.latent, c.band, c.place
"""


def finish(
    lm: LanguageModel,
    info: SaeInfo,
    folder: Path,
    chunks: int,
    about: Mapping[str, Any],
    out: Path,
    done: Callable[[int], object],
) -> None:
    """Write the index file from its chunks; it appears complete or not at all.

    Args:
        lm: the model, whose unembedding gives the logit lens.
        info: its SAE.
        folder: of the chunks.
        chunks: their number.
        about: what the index is of.
        out: the file.
        done: called with the number of latents since the last call; each counts twice.
    """
    part = folder / "index.duckdb"
    part.unlink(missing_ok=True)
    with duckdb.connect(str(part)) as database:
        temporary = str(folder / "tmp").replace("'", "''")
        database.execute(f"SET memory_limit='{MEMORY}'; SET temp_directory='{temporary}'")
        database.execute(_TABLES)
        tables = {t: all_files(folder, t, chunks) for t in ("fired", "peak", "bin", "token")}
        looked = _texts(database, folder, chunks, tables["token"], lm)
        database.execute(_LATENT.format(**tables), [max(1, looked), info.d_sae])
        for start in range(0, info.d_sae, LATENTS):
            stop = min(start + LATENTS, info.d_sae)
            _examples(database, tables, start, stop)
            done(stop - start)
        for lens in logit_lens(lm, info, done):
            _keep_lens(database, lens)
        _sample(database, tables, looked)
        facts = {**about, "tokens": looked}
        database.executemany(
            "INSERT INTO about VALUES (?, ?)", [[k, json.dumps(v)] for k, v in facts.items()]
        )
        database.execute("CHECKPOINT")
    part.replace(out)


def _texts(
    database: duckdb.DuckDBPyConnection, folder: Path, chunks: int, token: str, lm: LanguageModel
) -> int:
    """Keep the texts, the words for their tokens, and how features judged them.

    Returns:
        Number of tokens that were looked at.
    """
    text, score = (all_files(folder, name, chunks) for name in ("text", "score"))
    database.execute(
        "INSERT INTO text SELECT text, id, label, kind, prompt_tokens, tokens "  # noqa: S608
        f"FROM {text} JOIN (SELECT text, list(token ORDER BY pos) AS tokens FROM {token} "
        "GROUP BY text) USING (text) ORDER BY text"
    )
    database.execute(f"CREATE TABLE score AS SELECT * FROM {score} ORDER BY feature, text")  # noqa: S608
    pieces = [[i, lm.tokenizer.decode([i])] for i in range(len(lm.tokenizer))]
    names = {"token": np.arange(len(pieces)), "piece": np.array([p for _, p in pieces], object)}
    database.register("names", names)
    database.execute("INSERT INTO piece SELECT * FROM names")
    found = database.execute(f"SELECT count(*) FILTER (looked) FROM {token}").fetchone()  # noqa: S608
    assert found is not None
    return int(found[0])


def _examples(
    database: duckdb.DuckDBPyConnection, tables: Mapping[str, str], start: int, stop: int
) -> None:
    """Choose the texts that are shown of the latents `[start, stop)`."""
    peaks = database.execute(
        f"SELECT * FROM {tables['peak']} WHERE latent >= ? AND latent < ?",  # noqa: S608
        [start, stop],
    ).fetchnumpy()
    index, band, place = choose(peaks["latent"], peaks["text"], peaks["value"])
    if not len(index):
        return
    chosen = {name: np.ascontiguousarray(column[index]) for name, column in peaks.items()}
    database.register("chosen", {**chosen, "band": band, "place": place})
    database.execute(_EXAMPLES.format(around=AROUND, fired=tables["fired"]), [start, stop])


def _keep_lens(database: duckdb.DuckDBPyConnection, lens: Lens) -> None:
    count, tokens = lens.up.shape
    rows = {
        "latent": np.repeat(np.arange(lens.latent, lens.latent + count), tokens),
        "place": np.tile(np.arange(tokens), count),
        "up": lens.up.ravel(),
        "up_value": lens.up_value.ravel(),
        "down": lens.down.ravel(),
        "down_value": lens.down_value.ravel(),
    }
    database.register("rows", rows)
    database.execute(
        "INSERT INTO lens SELECT latent, list(up ORDER BY place), list(up_value ORDER BY place), "
        "list(down ORDER BY place), list(down_value ORDER BY place) "
        "FROM rows GROUP BY latent ORDER BY latent"
    )


def _sample(database: duckdb.DuckDBPyConnection, tables: Mapping[str, str], looked: int) -> None:
    """Keep everything that fired on one of every so many tokens, evenly drawn."""
    every = max(1, -(-looked // SAMPLED))
    drawn = f"hash(text * 1048576::BIGINT + pos) % {every} = 0"
    database.execute(
        "CREATE TABLE sample AS SELECT text, pos, latent, value "  # noqa: S608
        f"FROM {tables['fired']} WHERE {drawn} ORDER BY text, pos"
    )
    database.execute(
        "INSERT INTO about SELECT 'sampled', count(*)::VARCHAR "  # noqa: S608
        f"FROM {tables['token']} WHERE looked AND {drawn}"
    )
