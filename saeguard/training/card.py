"""Read and write `card.json` beside a checkpoint: its training data and its evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saeguard.atomic_files import write_atomically
from saeguard.training.errors import TrainingError

CARD = "card.json"
SCHEMA = "saeguard.sae-card/v1"
DIGITS = 6
"""Significant digits of measured numbers."""


def read_card(folder: Path) -> dict[str, Any]:
    """Return the card of a checkpoint, an empty one if it has none.

    Raises:
        TrainingError: it is not a card.
    """
    path = folder / CARD
    if not path.exists():
        return {"schema": SCHEMA}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path}: not a card: {error}") from error
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != SCHEMA:
        raise TrainingError(f"{path}: schema: found {schema!r}, expected {SCHEMA!r}")
    out: dict[str, Any] = found
    return out


def write_card(folder: Path, **sections: Mapping[str, Any]) -> None:
    """Set some sections of the card; the others stay as they are."""
    card = read_card(folder) | {name: _rounded(value) for name, value in sections.items()}
    write_atomically(folder / CARD, json.dumps(card, indent=2) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(part) for part in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
