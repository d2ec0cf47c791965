"""Read a text with the model while the page is open."""

from __future__ import annotations

from threading import Lock
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from saeguard.browse.shown import step, visible
from saeguard.errors import InputError
from saeguard.features.types import FeatureSet
from saeguard.hf.model import LanguageModel
from saeguard.hf.on_prompt import on_prompt
from saeguard.hf.texts import make_turn
from saeguard.latents.prompts import by_position
from saeguard.sae import SaeInfo

LONGEST = 20_000
"""Characters of a text."""
TOKENS = 2048
LATENTS = 12
"""Strongest latents of a token that are sent."""


class Asked(BaseModel):
    """A text to be read."""

    model_config = ConfigDict(strict=True, extra="forbid")

    prompt: str = Field("", max_length=LONGEST)
    completion: str = Field("", max_length=LONGEST)
    latent: int | None = Field(None, ge=0)


class Live:
    """A loaded model; it reads one text at a time."""

    def __init__(self, lm: LanguageModel, info: SaeInfo, features: FeatureSet | None) -> None:
        """Hold what reads texts."""
        self._lm, self._info, self._features = lm, info, features
        self._lock = Lock()

    def read(self, asked: Asked, highest: float | None) -> dict[str, Any]:
        """Return the tokens of a text with what fired on each.

        Args:
            asked: the text, and the latent that colours it.
            highest: activation of that latent with the full colour; None: the text's own.

        Raises:
            InputError: the text has no token, too many, or none that is looked at.
        """
        text = make_turn("the text", self._lm.tokenizer, asked.prompt, asked.completion)
        if len(text.tokens) > TOKENS:
            raise InputError(f"the text has {len(text.tokens)} tokens; expected {TOKENS} at most")
        with self._lock:
            found = on_prompt(self._lm, self._info, self._features, text)
        values = np.zeros(len(text.tokens))
        if asked.latent is not None:
            of = found.latent == asked.latent
            values[found.token[of]] = found.value[of]
        full = max(float(values.max()), 1e-9) if highest is None else highest
        fired = by_position(found, LATENTS)
        tokens = [
            {
                "text": visible(piece),
                "looked": bool(looked),
                "value": round(float(value), 4),
                "step": step(float(value), full),
                "latents": [[latent, round(v, 4)] for latent, v in latents],
            }
            for piece, looked, value, latents in zip(
                found.pieces, found.looked, values, fired, strict=True
            )
        ]
        return {"tokens": tokens, "strongest": int(values.argmax())}
