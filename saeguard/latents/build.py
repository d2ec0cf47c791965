"""Make an index: read a corpus chunk by chunk, then put the chunks together.

What fired is written to Parquet files as it is found, about 6 bytes an activation; the finished
index keeps what is looked up. Memory holds one chunk, then the peaks of a few hundred latents.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saeguard.atomic_files import write_atomically
from saeguard.errors import InputError
from saeguard.features.calibrate import shares, values
from saeguard.features.corpus import Corpus, norms_of, peaks
from saeguard.features.reading import PEAK, read_words
from saeguard.features.types import FeatureSet
from saeguard.hf.corpus import make_corpus
from saeguard.hf.model import LanguageModel
from saeguard.hf.text_files import TextFile
from saeguard.hf.texts import Text
from saeguard.latents.chunk import make_chunk, whole_chunks, write_chunk
from saeguard.latents.finish import finish
from saeguard.part_files import begin
from saeguard.sae import SaeInfo, encode_full, open_encoder

SCHEMA = "saeguard.index/v1"
CHUNK_BYTES = 128 << 20
"""Residuals of one chunk: what is in memory, and what is computed again at most after a cut."""
LEAST_TOKENS = 4096
NORMS = "norms.json"


@dataclass(frozen=True, slots=True)
class Progress:
    """How the work tells how far it is; each is called with the number done since its last call."""

    texts: Callable[[int], object] = lambda _count: None
    latents: Callable[[int], object] = lambda _count: None


def build_index(
    lm: LanguageModel,
    info: SaeInfo,
    files: Sequence[TextFile],
    out: Path,
    *,
    features: FeatureSet | None = None,
    resume: bool = False,
    chunk_tokens: int | None = None,
    progress: Progress = Progress(),
) -> None:
    """Write the index of a corpus to `out`, a DuckDB file.

    Args:
        lm: the model.
        info: its SAE.
        files: the texts.
        out: the file; what is unfinished lies in `OUT.part`.
        features: a set of this SAE: how each text is judged by each feature is kept, and its bounds
            on the norm hold. Without a bound, one is measured on the first chunk.
        resume: go on with what an earlier run left.
        chunk_tokens: tokens after which a chunk ends; by default as many as fit into memory.
        progress: of reading and of putting together.

    Raises:
        InputError: an earlier run was cut off and `resume` is not set, or was about something else.
        TextError: a file has changed since it was checked.
        SaeError, ProbeError: the SAE or a probe cannot be read.
    """
    layers = sorted({info.layer, *(() if features is None else features.layers)})
    if chunk_tokens is None:
        chunk_tokens = max(LEAST_TOKENS, CHUNK_BYTES // (4 * lm.hidden_size * len(layers)))
    about = {
        "schema": SCHEMA,
        "model": lm.name,
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "sae": {"sha256": info.sha256, "layer": info.layer, "d_sae": info.d_sae, "d_in": info.d_in},
        "corpus": [
            {"file": file.path.name, "sha256": file.sha256, "texts": file.count} for file in files
        ],
        "set": None if features is None else {"id": features.id, "digest": features.digest},
        "features": [] if features is None else list(features.features),
        "chunk_tokens": chunk_tokens,
    }
    folder = out.with_name(f"{out.name}.part")
    if out.is_dir():
        raise InputError(f"{out}: expected a file to write, found a folder; name a file")
    with begin(folder, about, resume=resume):
        ready = whole_chunks(folder)
        reader = _Reader(lm, info, features, layers, folder)
        chunks = 0
        for number, first, texts in _chunks(files, chunk_tokens):
            if number < ready:
                progress.texts(len(texts))
            else:
                reader.read(number, first, texts, progress.texts)
            chunks = number + 1
        bounds = json.loads((folder / NORMS).read_text())
        finish(lm, info, folder, chunks, about | {"max_norm": bounds}, out, progress.latents)
    shutil.rmtree(folder)


class _Reader:
    """Reads the texts of one chunk after the other."""

    def __init__(
        self,
        lm: LanguageModel,
        info: SaeInfo,
        features: FeatureSet | None,
        layers: Sequence[int],
        folder: Path,
    ) -> None:
        self._lm, self._features, self._layers, self._folder = lm, features, layers, folder
        self._encoder, self._layer = open_encoder(info), info.layer
        self._excluded = lm.special_tokens if features is None else features.exclude_tokens

    def read(
        self, number: int, first: int, texts: Sequence[Text], done: Callable[[int], object]
    ) -> None:
        """Record the texts, and write what fired on them as the chunk `number`."""
        corpus = make_corpus(self._lm, texts, self._layers, self._excluded, done=done)
        corpus = corpus.without_massive(self._bounds(corpus))
        fired = encode_full(self._encoder, corpus.at(self._layer)).cpu()
        scores = [] if self._features is None else list(_scores(self._features, corpus))
        write_chunk(self._folder, number, make_chunk(corpus, texts, first, fired, scores))

    def _bounds(self, corpus: Corpus) -> dict[int, float]:
        """Return the bounds on the norm by layer; measured once, on the first chunk."""
        file = self._folder / NORMS
        if not file.exists():
            chosen = {} if self._features is None else dict(self._features.max_norm)
            bounds, _ = norms_of(corpus, chosen)
            write_atomically(file, json.dumps(bounds))
        return {int(layer): bound for layer, bound in json.loads(file.read_text()).items()}


def _scores(features: FeatureSet, corpus: Corpus) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield each feature's number, the texts with a token in its scope, and their shares."""
    for number, feature in enumerate(features.features.values()):
        scoped = corpus.scoped_texts(feature.evidence.get("scope", "output"))
        if not scoped.any():
            continue
        part = corpus.select(scoped).scoped(feature.evidence.get("scope", "output"))
        reading = read_words(str(feature.evidence.get("window", PEAK.words)))
        found = shares(feature, peaks(part, values(features, feature, part), reading))
        yield number, np.flatnonzero(scoped), found


def _chunks(files: Sequence[TextFile], most: int) -> Iterator[tuple[int, int, list[Text]]]:
    """Yield number, number of the first text, and texts of each chunk."""
    number = first = tokens = 0
    texts: list[Text] = []
    for file in files:
        for text in file.read():
            texts.append(text)
            tokens += len(text.tokens)
            if tokens >= most:
                yield number, first, texts
                number, first, tokens, texts = number + 1, first + len(texts), 0, []
    if texts:
        yield number, first, texts


def index_facts(about: dict[str, Any]) -> str:
    """Return what an index is of, in a line."""
    texts = sum(part["texts"] for part in about["corpus"])
    return (
        f"{about['sae']['d_sae']:,} latents of layer {about['sae']['layer']} of {about['model']}, "
        f"on {texts:,} texts"
    )
