"""What a model writes with a latent held at a value, beside what it writes by itself."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from saeguard.effect.attribute import Change, Scored, log_probabilities, setting
from saeguard.hf.model import LanguageModel
from saeguard.hf.residuals import on_output
from saeguard.sae import SaeInfo


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are drawn."""

    max_tokens: int = 40
    samples: int = 1
    temperature: float = 0.0
    """0: the likeliest token."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Arm:
    """The answers under one edit."""

    scale: float | None
    """Times the latent's usual maximum; None: no edit."""
    activation: float | None
    samples: tuple[str, ...]
    loss: float
    """Nats per token on the texts, under the edit."""


def steer(
    lm: LanguageModel,
    info: SaeInfo,
    latent: int,
    prompt: Sequence[int],
    arms: Sequence[tuple[float, float]],
    *,
    sampling: Sampling = Sampling(),
    texts: Sequence[Scored] = (),
    excluded: Sequence[int] = (),
    bound: float = float("inf"),
) -> list[Arm]:
    """Return what the model writes without an edit, and with the latent at each of some values.

    The latent is set at every token, of prompt and answer, that is neither excluded nor an
    attention sink. Without `texts`, the loss is on the answer of the model without an edit.

    Args:
        lm: the model.
        info: its SAE, whose latents do not compete.
        latent: its number.
        prompt: token ids.
        arms: scale and activation of each edit.
        sampling: how answers are drawn, alike in all arms.
        texts: to measure the loss on.
        excluded: token ids that are not edited.
        bound: norm of the residual above which a token is not edited.
    """
    plain = _sample(lm, info, prompt, None, sampling)
    if not texts:
        tokens = (*prompt, *plain[0])
        texts = [Scored(tokens, len(prompt), 1, "answer", "answer")]
    special = np.isin(np.array(prompt), np.array(excluded, np.int64))
    out = []
    for scale, activation in ((None, None), *arms):
        change: Change | None = None
        drawn = plain
        if activation is not None:
            change = _sparing(setting(info, {latent: activation}, lm.model.device), bound)
            drawn = _sample(lm, info, prompt, _sparing_first(change, special), sampling)
        loss = -float(log_probabilities(lm, texts, info.layer, change, excluded).mean())
        words = tuple(lm.tokenizer.decode(ids, skip_special_tokens=True) for ids in drawn)
        out.append(Arm(scale, activation, words, loss))
    return out


def _sparing(change: Change, bound: float) -> Change:
    """Return the change, but for attention sinks."""

    def spared(x: torch.Tensor) -> torch.Tensor:
        kept = torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True) <= bound
        return torch.where(kept, change(x), x)

    return spared


def _sparing_first(change: Change, special: np.ndarray) -> Change:
    """Return the change, but for special tokens of the prompt, which come first."""
    kept = torch.from_numpy(~special)

    def spared(x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] != len(kept):  # tokens of the answer, one at a time
            return change(x)
        return torch.where(kept.to(x.device)[None, :, None], change(x), x)

    return spared


@torch.no_grad()
def _sample(
    lm: LanguageModel,
    info: SaeInfo,
    prompt: Sequence[int],
    change: Change | None,
    sampling: Sampling,
) -> list[tuple[int, ...]]:
    torch.manual_seed(sampling.seed)
    ids = torch.tensor([list(prompt)], device=lm.model.device)
    drawn: dict[str, Any] = {"do_sample": False}
    if sampling.temperature:
        drawn = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_k": 0,
            "num_return_sequences": sampling.samples,
        }
    edit = nullcontext() if change is None else on_output(lm, info.layer, change)
    with edit:
        out = lm.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=sampling.max_tokens,
            pad_token_id=lm.tokenizer.eos_token_id,
            **drawn,
        )
    return [tuple(row[len(prompt) :].tolist()) for row in out]
