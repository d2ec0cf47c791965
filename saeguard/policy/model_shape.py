"""Check that feature sets hold for a model, from its `config.json` alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from saeguard.errors import InputError

WIDTH = ("hidden_size", "n_embd", "d_model", "dim")
DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


class ModelConfigError(InputError):
    """A model's configuration cannot be read; says what to do."""


class Pinned(Protocol):
    """What a feature set says of its model."""

    @property
    def name(self) -> str:
        """What the feature set calls it."""

    @property
    def hidden_size(self) -> int:
        """Width of its residual stream."""

    @property
    def num_layers(self) -> int:
        """How many decoder layers it has."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model as far as its configuration tells."""

    name: str
    """The folder's name."""
    hidden_size: int
    num_layers: int

    def differs(self, pinned: Pinned) -> str:
        """Return how the model differs from the one a feature set is made for; empty if not."""
        wanted, found = (pinned.hidden_size, pinned.num_layers), (self.hidden_size, self.num_layers)
        if wanted == found:
            return ""
        return (
            f"made for {pinned.name}, width {wanted[0]} and {wanted[1]} layers, but {self.name} "
            f"has width {found[0]} and {found[1]} layers"
        )


def read_shape(folder: Path) -> ModelShape:
    """Read width and depth from a model folder's `config.json`; no weights, no torch.

    Raises:
        ModelConfigError: there is none, or it names neither.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelConfigError(f"{path}: {error.strerror}; give the folder of a model") from error
    except ValueError as error:
        raise ModelConfigError(f"{path}: {error}; give the folder of a model") from error
    config = config.get("text_config", config) if isinstance(config, dict) else {}
    return ModelShape(
        folder.resolve().name, _number(path, config, WIDTH), _number(path, config, DEPTH)
    )


def _number(path: Path, config: Mapping[str, Any], keys: tuple[str, ...]) -> int:
    numbers = (config.get(key) for key in keys)
    found = next((number for number in numbers if isinstance(number, int)), None)
    if found is None:
        raise ModelConfigError(f"{path}: none of the keys {', '.join(keys)} is there")
    return found
