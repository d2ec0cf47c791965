"""Tell one model's weights from another's: the digest of all its weight files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from saeguard.sae.checkpoint_info import file_sha256

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
"""Names the shards, and the shard of each tensor, if the weights are in several files."""


def weights_sha256(folder: Path) -> str | None:
    """Return the digest of a model's weights; None if it is not in safetensors files.

    Of one file it is the file's own. Of several it is the sha256 of a text: for each shard a line
    with its sha256 and its name, as `sha256sum` prints them, then for each tensor its name and its
    shard; both sorted by name. The index may hold other things.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: the index is not one.
    """
    weights, index = folder / WEIGHTS, folder / INDEX
    if weights.is_file():
        return file_sha256(weights)
    if not index.is_file():
        return None
    content = json.loads(index.read_bytes())
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
        raise ValueError(f"{index}: expected the key weight_map, an object of file names")
    lines = [f"{file_sha256(folder / name)}  {name}" for name in sorted(set(shards.values()))]
    lines += [f"{tensor} {shard}" for tensor, shard in sorted(shards.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_quantization(folder: Path) -> str | None:
    """Return how the weights of the model in a folder are quantised, None if they are not."""
    try:
        return quantization_of(json.loads((folder / "config.json").read_bytes()))
    except (OSError, ValueError):
        return None


def quantization_of(config: Any) -> str | None:
    """Return how a model's weights are quantised, in the words of its `config.json`, or None.

    Args:
        config: the configuration as Transformers reads it, or as a dictionary.
    """
    found = getattr(config, "quantization_config", None)
    found = config.get("quantization_config") if isinstance(config, dict) else found
    method = found.get("quant_method") if isinstance(found, dict) else None
    method = getattr(found, "quant_method", method)
    return None if method is None else str(getattr(method, "value", method))
