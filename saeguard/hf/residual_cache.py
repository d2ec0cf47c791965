"""Keep recorded residuals on disk, so that a recording that was cut off goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from saeguard.atomic_files import write_atomically
from saeguard.file_marks import marks
from saeguard.hf.model import LanguageModel
from saeguard.hf.residuals import record

TEXTS = 128
"""Texts of one file: what is computed again at most after a cut."""


def record_cached(
    lm: LanguageModel, texts: Sequence[Sequence[int]], layers: Sequence[int], cache: Path | None
) -> Iterator[tuple[int, Mapping[int, torch.Tensor]]]:
    """Yield what `record` yields, in another order; recorded texts are read from `cache`.

    Texts of similar length share a file of the cache. It is named by the model's files, the layers
    and the tokens, so that nothing stale is ever read. A damaged file is written again. It takes
    4 bytes times tokens times width times layers.

    Args:
        lm: the model.
        texts: token ids, none of them empty.
        layers: `resid_post` of these blocks.
        cache: folder; None keeps nothing.

    Raises:
        OSError: the folder cannot be written.
    """
    if cache is None:
        yield from record(lm, texts, layers)
        return
    model = [str(lm.model.dtype), *_model_key(lm.path)]
    order = np.argsort([len(text) for text in texts], kind="stable")
    for start in range(0, len(order), TEXTS):
        some = order[start : start + TEXTS].tolist()
        tokens = [list(texts[i]) for i in some]
        key = json.dumps([model, sorted(layers), tokens])
        file = cache / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
        lengths = [len(text) for text in tokens]
        kept = _read(file, layers, sum(lengths))
        if kept is None:
            recorded = dict(record(lm, tokens, layers))
            kept = {
                layer: torch.cat([recorded[i][layer] for i in range(len(tokens))])
                for layer in layers
            }
            write_atomically(file, save({str(layer): x for layer, x in kept.items()}))
        parts = {layer: torch.split(x, lengths) for layer, x in kept.items()}
        for row, i in enumerate(some):
            yield i, {layer: parts[layer][row] for layer in layers}


def _read(file: Path, layers: Sequence[int], tokens: int) -> dict[int, torch.Tensor] | None:
    if not file.is_file():
        return None
    try:
        found = {int(name): x for name, x in load_file(file).items()}
    except (SafetensorError, OSError, ValueError):
        return None
    whole = set(found) == set(layers) and all(len(x) == tokens for x in found.values())
    return found if whole else None


def _model_key(folder: Path) -> list[tuple[str | int, ...]]:
    """Return name and marks of the files that the residuals depend on."""
    files = [*folder.glob("*.safetensors"), folder / "config.json"]
    return [(file.name, *marks(file.stat())) for file in sorted(files)]
