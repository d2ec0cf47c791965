"""Everything that fired on some texts, as Parquet files: one chunk of an index.

A chunk holds whole texts, so a latent's highest activation in a text is known once the chunk is.
Its last file appears when the others are complete, so a run that was killed goes on behind the last
whole chunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np

from saeguard.features.corpus import Corpus
from saeguard.hf.texts import Text
from saeguard.sae import Sparse

BINS = 4
"""Bins of a histogram for each doubling of the activation."""
TABLES = ("fired", "peak", "bin", "score", "token", "text")
"""In the order in which they are written."""

Columns = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tables of one chunk, each of columns [rows]. Texts are numbered across all chunks."""

    fired: Columns
    """latent, text, pos (the token's position), value: each activation above 0, by latent."""
    peak: Columns
    """latent, text, pos, value: the strongest token of each text in which a latent fires."""
    bin: Columns
    """latent, bin, tokens, total: activations in `[2**(bin / 4), 2**((bin + 1) / 4))`."""
    score: Columns
    """text, feature (its number), share: the number by which a feature's policies judge a text."""
    token: Columns
    """text, pos, token (its id), looked (neither special nor an attention sink)."""
    text: Columns
    """text, id, label, kind, prompt_tokens."""


def make_chunk(
    corpus: Corpus,
    texts: Sequence[Text],
    first: int,
    fired: Sparse,
    scores: Sequence[tuple[int, np.ndarray, np.ndarray]] = (),
) -> Chunk:
    """Return the chunk of some texts.

    Args:
        corpus: the texts as recorded.
        texts: the same, with their ids.
        first: number of the first of them.
        fired: the activations of all its tokens.
        scores: for each feature its number, texts [n] within the corpus, and their shares [n].
    """
    token, latent, value = (part.numpy() for part in (fired.token, fired.latent, fired.value))
    kept = ~corpus.special[token] & (value > 0)
    token, latent, value = token[kept], latent[kept], value[kept]
    text, at = corpus.owner[token], corpus.position[token]
    order = np.lexsort((at, text, latent))
    rows = {
        "latent": latent[order].astype(np.int32),
        "text": (text[order] + first).astype(np.int32),
        "pos": at[order].astype(np.int32),
        "value": value[order].astype(np.float32),
    }
    numbers = np.arange(first, first + len(texts), dtype=np.int32)
    return Chunk(
        fired=rows,
        peak=_peaks(rows),
        bin=_bins(rows),
        score={
            "text": _joined([of + first for _, of, _ in scores], np.int32),
            "feature": _joined([np.full(len(of), i) for i, of, _ in scores], np.int32),
            "share": _joined([share for _, _, share in scores], np.float32),
        },
        token={
            "text": (corpus.owner + first).astype(np.int32),
            "pos": corpus.position.astype(np.int32),
            "token": corpus.tokens.astype(np.int32),
            "looked": ~corpus.special,
        },
        text={
            "text": numbers,
            "id": np.array([t.id for t in texts], object),
            "label": np.array([t.label for t in texts], np.int32),
            "kind": np.array([t.kind for t in texts], object),
            "prompt_tokens": np.array([t.prompt_tokens for t in texts], np.int32),
        },
    )


def write_chunk(folder: Path, number: int, chunk: Chunk) -> None:
    """Write the files of a chunk; each appears complete or not at all, that of texts last.

    Raises:
        duckdb.IOException: the folder cannot be written.
    """
    with duckdb.connect() as database:
        for table in TABLES:
            database.register("part", dict(getattr(chunk, table)))
            unfinished = folder / f".{table}"
            database.execute(
                f"COPY (SELECT * FROM part) TO '{_quoted(unfinished)}' "  # noqa: S608 - our own names
                "(FORMAT parquet, COMPRESSION zstd)"
            )
            unfinished.replace(file_of(folder, table, number))


def whole_chunks(folder: Path) -> int:
    """Return how many chunks are complete, counted from the first."""
    count = 0
    while file_of(folder, TABLES[-1], count).exists():
        count += 1
    return count


def file_of(folder: Path, table: str, number: int) -> Path:
    """Return the file of one table of a chunk."""
    return folder / f"{table}-{number:06d}.parquet"


def all_files(folder: Path, table: str, chunks: int) -> str:
    """Return an expression of SQL that reads one table of all chunks."""
    files = ", ".join(f"'{_quoted(file_of(folder, table, i))}'" for i in range(chunks))
    return f"read_parquet([{files}])"


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")


def _peaks(rows: Columns) -> Columns:
    """Return the strongest token of each latent and text, the first of equals."""
    order = np.lexsort((rows["pos"], -rows["value"], rows["text"], rows["latent"]))
    latent, text = rows["latent"][order], rows["text"][order]
    first = np.ones(len(order), bool)
    first[1:] = (latent[1:] != latent[:-1]) | (text[1:] != text[:-1])
    return {name: column[order[first]] for name, column in rows.items()}


def _bins(rows: Columns) -> Columns:
    """Return tokens and the sum of their activations, by latent and bin."""
    bins = np.floor(BINS * np.log2(rows["value"].astype(np.float64))).astype(np.int64)
    keys, index = np.unique(
        rows["latent"].astype(np.int64) * (1 << 16) + bins + (1 << 15), return_inverse=True
    )
    return {
        "latent": (keys >> 16).astype(np.int32),
        "bin": ((keys & ((1 << 16) - 1)) - (1 << 15)).astype(np.int32),
        "tokens": np.bincount(index, minlength=len(keys)),
        "total": np.bincount(index, weights=rows["value"], minlength=len(keys)),
    }


def _joined(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    out: np.ndarray = np.concatenate([np.empty(0, dtype), *parts]).astype(dtype)
    return out
