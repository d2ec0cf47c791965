"""Check that feature sets fit a model: its width, its depth and, if pinned, its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from saeguard.errors import InputError
from saeguard.features.model_identity import weights_sha256
from saeguard.real_path import real_path

WIDTH = ("hidden_size", "n_embd", "d_model", "dim")
DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


class ModelFitError(InputError):
    """A model is not the one that a feature set was made for, or its shape cannot be read."""


class Pinned(Protocol):
    """What a feature set states about its model."""

    @property
    def name(self) -> str:
        """Name of the model in the feature set."""

    @property
    def hidden_size(self) -> int:
        """Width of its residual stream."""

    @property
    def num_layers(self) -> int:
        """Number of its decoder layers."""

    @property
    def sha256(self) -> str | None:
        """Digest of its weights (`weights_sha256`), if the feature set pins them."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model's name, width and depth."""

    name: str
    hidden_size: int
    num_layers: int


def misfit(pinned: Pinned, model: ModelShape) -> str:
    """Return how a model differs from the one a feature set was made for; empty if it fits."""
    if (pinned.hidden_size, pinned.num_layers) == (model.hidden_size, model.num_layers):
        return ""
    return (
        f"made for {pinned.name}, width {pinned.hidden_size} and {pinned.num_layers} layers, but "
        f"{model.name} has width {model.hidden_size} and {model.num_layers} layers"
    )


def sae_misfit(d_in: int, layer: int, model: ModelShape) -> str:
    """Return why an SAE cannot read a model's residual stream; empty if it can.

    Args:
        d_in: width of the vectors that the SAE reads.
        layer: the layer that it reads.
        model: to be read.
    """
    if d_in != model.hidden_size:
        return (
            f"the SAE reads vectors of width {d_in}, but the residual stream of {model.name} is "
            f"{model.hidden_size} wide: the SAE belongs to another model"
        )
    if not 0 <= layer < model.num_layers:
        return (
            f"the SAE reads layer {layer}, but {model.name} has layers 0 to {model.num_layers - 1}"
        )
    return ""


def check_fit(pinned: Pinned, model: ModelShape, folder: Path | None = None, *, at: str) -> None:
    """Check that a feature set was made for a model.

    Args:
        pinned: what the feature set states about its model.
        model: the one at hand.
        folder: of the model; if the feature set pins its weights, they are compared, too.
        at: the feature set's name or file, for the message.

    Raises:
        ModelFitError: names both values.
    """
    difference = misfit(pinned, model)
    if difference:
        raise ModelFitError(
            f"{at} is {difference}; use that model, or feature sets made for this one"
        )
    if pinned.sha256 is None or folder is None or not folder.is_dir():
        return
    try:
        found = weights_sha256(folder)
    except (OSError, ValueError) as error:
        raise ModelFitError(f"{folder}: the model's weights cannot be compared: {error}") from error
    if found != pinned.sha256:
        raise ModelFitError(
            f"{folder}: found weights of sha256 {found}, but {at} was made for {pinned.name} with "
            f"sha256 {pinned.sha256}: its latents mean nothing with other weights. If these are "
            "the same weights quantised, or in other shards, calibrate the set with them"
        )


def name_of(folder: Path) -> str:
    """Return the name of the model in a folder: the folder's, or the model's on the hub.

    In the hub's cache a model lies in `models--OWNER--NAME/snapshots/COMMIT`.
    """
    folder = real_path(folder)
    parts = folder.parts[-3:]
    if len(parts) == len(("repository", "snapshots", "commit")) and parts[1] == "snapshots":
        return parts[0].removeprefix("models--").rpartition("--")[2]
    return folder.name


def read_shape(folder: Path) -> ModelShape:
    """Read width and depth from a model folder's `config.json`; no weights, no torch.

    Raises:
        ModelFitError: the file is missing or names neither.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelFitError(f"{path}: {error.strerror}; give the folder of a model") from error
    except ValueError as error:
        raise ModelFitError(f"{path}: {error}; give the folder of a model") from error
    config = config.get("text_config", config) if isinstance(config, dict) else {}
    return ModelShape(name_of(folder), _number(path, config, WIDTH), _number(path, config, DEPTH))


def _number(path: Path, config: Mapping[str, Any], keys: tuple[str, ...]) -> int:
    numbers = (config.get(key) for key in keys)
    found = next((number for number in numbers if isinstance(number, int)), None)
    if found is None:
        raise ModelFitError(f"{path}: expected one of the keys {', '.join(keys)}, found none")
    return found
