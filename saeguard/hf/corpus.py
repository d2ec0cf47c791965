"""Run a model over labelled texts, for search and calibration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from saeguard.features.corpus import Corpus
from saeguard.features.room import allocate
from saeguard.hf.model import LanguageModel
from saeguard.hf.residual_cache import record_cached
from saeguard.hf.text_rows import TextError
from saeguard.hf.texts import Text, read_texts


def read_corpus(
    lm: LanguageModel, path: str | Path, layers: Sequence[int], exclude_tokens: Sequence[int]
) -> Corpus:
    """Read the JSON lines in `path` and record `resid_post` of `layers` for every token.

    Texts without any output token are left out: policies on the output would not look at them.
    The residuals take 4 bytes times tokens times width times layers, in memory or on disk.

    Raises:
        TextError: a line is wrong, or no text has output tokens.
        RoomError: there is no room for the residuals.
    """
    return make_corpus(lm, read_outputs(path, lm.tokenizer), layers, exclude_tokens, str(path))


def read_outputs(path: str | Path, tokenizer: Any) -> list[Text]:
    """Return the texts of `path` that have output tokens.

    Raises:
        TextError: a line is wrong, or no text has output tokens.
    """
    texts = [t for t in read_texts(path, tokenizer) if len(t.tokens) > t.prompt_tokens]
    if not texts:
        raise TextError(f"{path}: no text with output tokens")
    return texts


def make_corpus(
    lm: LanguageModel,
    texts: Sequence[Text],
    layers: Sequence[int],
    exclude_tokens: Sequence[int],
    name: str = "texts",
    cache: Path | None = None,
    done: Callable[[int], object] | None = None,
) -> Corpus:
    """Record `texts`, in their order.

    Args:
        lm: the model.
        texts: none of them empty.
        layers: `resid_post` of these blocks.
        exclude_tokens: ids that are not evaluated.
        name: shown on the progress bar.
        cache: folder that keeps what was recorded, see `record_cached`.
        done: called with 1 for each text, in place of a progress bar.
    """
    tokens = [text.tokens for text in texts]
    layers = sorted(set(layers))
    end = np.cumsum([len(t) for t in tokens])
    x = allocate(int(end[-1]), len(layers) * lm.hidden_size)
    for i, residuals in tqdm(
        record_cached(lm, tokens, layers, cache),
        desc=Path(name).name,
        total=len(texts),
        unit="text",
        disable=done is not None,
    ):
        torch.cat([residuals[n] for n in layers], 1, out=x[end[i] - len(tokens[i]) : end[i]])
        if done is not None:
            done(1)
    ids = np.concatenate([np.array(t, np.int64) for t in tokens])
    return Corpus(
        x=x,
        layers=tuple(layers),
        tokens=ids,
        lengths=np.array([len(t) for t in tokens]),
        output=np.concatenate([np.arange(len(t.tokens)) >= t.prompt_tokens for t in texts]),
        special=np.isin(ids, np.array(exclude_tokens, np.int64)),
        label=np.array([bool(t.label) for t in texts]),
        kind=np.array([t.kind for t in texts]),
        template=np.array([t.template for t in texts]),
    )
