"""Edits as the command line writes them: `to=1`, `activation=8`, `scale=2`, `ablate`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

from saeguard.errors import InputError
from saeguard.policy.types import Edit

FORMS = "to=1, activation=8, scale=2, at_most=0.5 or ablate"


@dataclass(frozen=True, slots=True)
class EditSpec:
    """One edit of the clamp latents, in the words of policies."""

    how: Edit
    amount: float

    def __str__(self) -> str:
        """Return the edit as the command line writes it."""
        return self.how if self.how == "ablate" else f"{self.how}={self.amount:g}"

    @property
    def clamp(self) -> dict[str, float | bool]:
        """The keys of a policy's `clamp` section."""
        return {self.how: True if self.how == "ablate" else self.amount}


def parse_edit(text: str) -> EditSpec:
    """Return the edit that `text` names.

    Raises:
        InputError: it is no edit.
    """
    name, given, value = text.partition("=")
    try:
        amount = float(value) if given else 0.0
    except ValueError:
        amount = math.nan
    for how in get_args(Edit):
        if name == how and bool(given) == (how != "ablate") and math.isfinite(amount):
            return EditSpec(how, amount)
    raise InputError(f"--edit: found {text!r}; expected an edit, such as {FORMS}")
