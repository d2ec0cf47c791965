"""What fires on one text: its tokens, their residuals, and every latent above 0."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from saeguard.errors import InputError
from saeguard.features.massive import is_massive, measure_norms
from saeguard.features.types import FeatureSet
from saeguard.hf.model import LanguageModel
from saeguard.hf.residuals import record
from saeguard.hf.texts import Text
from saeguard.sae import SaeInfo, encode_full


@dataclass(frozen=True, slots=True)
class OnPrompt:
    """One text, read by the model and encoded."""

    text: Text
    pieces: tuple[str, ...]
    """[T] the text of each token."""
    looked: np.ndarray
    """[T] bool: neither a special token nor an attention sink."""
    x: torch.Tensor
    """[T, d_in] float32 residuals at the SAE's layer."""
    token: np.ndarray
    """[entries] position of each activation above 0, of tokens that are looked at."""
    latent: np.ndarray
    """[entries]"""
    value: np.ndarray
    """[entries] float32"""

    def peaks(self) -> dict[int, tuple[float, int]]:
        """Return each latent's highest activation, and the first position that has it."""
        order = np.lexsort((self.token, -self.value, self.latent))
        latents, first = np.unique(self.latent[order], return_index=True)
        at = order[first]
        return {
            int(latent): (float(self.value[i]), int(self.token[i]))
            for latent, i in zip(latents, at, strict=True)
        }


def on_prompt(
    lm: LanguageModel, info: SaeInfo, features: FeatureSet | None, text: Text
) -> OnPrompt:
    """Read a text, and encode it.

    Args:
        lm: the model.
        info: its SAE.
        features: a set, whose special tokens and bound on the norm hold; without one, the model's
            special tokens, and ten medians of the text's own norms.
        text: the text.

    Raises:
        InputError: every token is special or an attention sink.
        SaeError: the SAE cannot be read.
    """
    excluded = lm.special_tokens if features is None else features.exclude_tokens
    ids = np.array(text.tokens, np.int64)
    ((_, residuals),) = record(lm, [text.tokens], [info.layer])
    x = residuals[info.layer]
    looked = ~np.isin(ids, np.array(excluded, np.int64))
    norm = torch.linalg.vector_norm(x, dim=1).numpy()
    bound = None if features is None else features.max_norm.get(info.layer)
    if looked.any():
        bound, _ = measure_norms(norm[looked], np.flatnonzero(looked), bound)
        looked &= ~is_massive(norm, bound)
    if not looked.any():
        raise InputError(
            f"{text.id}: every token is special or an attention sink; give a longer text"
        )
    fired = encode_full(info, x).cpu()
    token, latent, value = fired.token.numpy(), fired.latent.numpy(), fired.value.numpy()
    kept = looked[token] & (value > 0)
    pieces = tuple(lm.tokenizer.decode([i]) for i in text.tokens)
    return OnPrompt(text, pieces, looked, x, token[kept], latent[kept], value[kept])


def one_token(lm: LanguageModel, text: str, option: str) -> int:
    """Return the token that a text is.

    Args:
        lm: the model.
        text: as it would follow the prompt; often it begins with a space.
        option: that gave the text, for the message.

    Raises:
        InputError: it is not one token.
    """
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        found = ", ".join(repr(lm.tokenizer.decode([i])) for i in ids) or "none"
        raise InputError(
            f"{option}: expected one token, {text!r} is {len(ids)}: {found}; most words begin with "
            "a space"
        )
    return int(ids[0])
