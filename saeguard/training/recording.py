"""Residuals on disk, so that several SAEs can be trained without running the model again.

A folder holds `index.json` and shards of one block each. The index is written after each shard, so
a recording that was cut off goes on after its last whole shard.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from saeguard.atomic_files import write_atomically
from saeguard.training.activations import Block, Counts, Streamed
from saeguard.training.errors import TrainingError
from saeguard.training.texts import shuffled_order

SCHEMA = "saeguard.activations/v1"
INDEX = "index.json"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class Recorded:
    """Residuals from a recording; each epoch reads its shards in another order."""

    folder: Path
    shards: tuple[Mapping[str, Any], ...]
    seed: int

    def block(self, at: int) -> Block:
        """Read the shard at position `at` of an endless shuffled order."""
        epoch, place = divmod(at, len(self.shards))
        order = shuffled_order(len(self.shards), self.seed, epoch)
        shard = self.shards[int(order[place])]
        x = load_file(self.folder / shard["file"])["x"].float()
        return Block(x, at + 1, Counts(*shard["counts"]))


def record(
    source: Streamed,
    folder: Path,
    settings: Mapping[str, Any],
    tokens: int,
    *,
    dtype: str = "float16",
    report: Callable[[int], None] = lambda _tokens: None,
) -> None:
    """Record until there are `tokens` tokens, or each text was read once; continue if cut off.

    Args:
        source: reads the model.
        folder: made if missing.
        settings: what the recording is of; another recording in `folder` is refused.
        tokens: wanted, all shards together.
        dtype: of the shards.
        report: called with the tokens recorded so far.

    Raises:
        TrainingError: the folder holds another recording, or a value does not fit `dtype`.
    """
    index = _begin(folder, {**settings, "dtype": dtype}, source.bound)
    while _tokens(index) < tokens and index["next"] < len(source.chunks):
        block = source.block(index["next"])
        x = block.x.to(DTYPES[dtype])
        if not bool(x.isfinite().all()):
            raise TrainingError(
                f"{folder}: a residual of {float(block.x.abs().max()):.0f} does not fit {dtype}; "
                "record with --record-dtype bfloat16"
            )
        name = f"shard-{len(index['shards']):05}.safetensors"
        part = folder / f".{name}.part"
        save_file({"x": x}, part)
        part.replace(folder / name)
        index["shards"].append({"file": name, "counts": list(block.counts)})
        index["next"] = block.following
        write_atomically(folder / INDEX, json.dumps(index, indent=1) + "\n")
        report(_tokens(index))


def open_recording(folder: Path, settings: Mapping[str, Any], seed: int) -> Recorded:
    """Open a recording for training.

    Raises:
        TrainingError: the folder holds no recording, or another one.
    """
    index = read_index(folder)
    _same(folder, index["settings"], settings)
    if not index["shards"]:
        raise TrainingError(
            f"{folder / INDEX}: shards: found [], expected at least one; record first"
        )
    return Recorded(folder, tuple(index["shards"]), seed)


def recorded_bound(folder: Path) -> float | None:
    """Return the norm above which the recording in `folder` leaves tokens out; None without one.

    A recording that is continued must use exactly the same norm.
    """
    return float(read_index(folder)["bound"]) if (folder / INDEX).exists() else None


def read_index(folder: Path) -> dict[str, Any]:
    """Return the content of `index.json`.

    Raises:
        TrainingError: it is missing, or not the index of a recording.
    """
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TrainingError(f"{path}: {error.strerror}; expected a recording") from error
    except ValueError as error:
        raise TrainingError(f"{path}: not JSON: {error}") from error
    found = index.get("schema") if isinstance(index, dict) else None
    if found != SCHEMA:
        raise TrainingError(f"{path}: schema: found {found!r}, expected {SCHEMA!r}")
    out: dict[str, Any] = index
    return out


def _begin(folder: Path, settings: dict[str, Any], bound: float) -> dict[str, Any]:
    """Return the index of the recording in `folder`, a new one if it holds none."""
    if (folder / INDEX).exists():
        index = read_index(folder)
        _same(folder, index["settings"], settings)
        return index
    folder.mkdir(parents=True, exist_ok=True)
    return {"schema": SCHEMA, "settings": settings, "bound": bound, "next": 0, "shards": []}


def _same(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name, value in wanted.items():
        if found.get(name) != value:
            raise TrainingError(
                f"{folder / INDEX}: settings.{name}: found {found.get(name)!r}, expected "
                f"{value!r}; give another --record folder, or the settings of this one"
            )


def _tokens(index: Mapping[str, Any]) -> int:
    return sum(Counts(*shard["counts"]).tokens for shard in index["shards"])
