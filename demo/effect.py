"""Measure what an edit of the residual does to what the model would write."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from saeguard.hf.model import LanguageModel
from saeguard.hf.residuals import BATCH_TOKENS, batches, on_output, padded
from saeguard.hf.texts import Text
from saeguard.sae import EncoderRows, activate

Change = Callable[[torch.Tensor], torch.Tensor]


def setting(rows: EncoderRows, W_dec: torch.Tensor, target: torch.Tensor) -> Change:
    """Return the edit that sets latents to `target` [latents] at every token.

    Args:
        rows: encoder of the latents.
        W_dec: [latents, d_in] their decoder rows.
        target: [latents] float32.
    """

    def change(x: torch.Tensor) -> torch.Tensor:
        f = activate(rows, x.reshape(-1, x.shape[-1]))
        return x + ((target - f) @ W_dec).reshape(x.shape)

    return change


@torch.no_grad()
def output_logprob(
    lm: LanguageModel, texts: Sequence[Text], layer: int, change: Change | None = None
) -> np.ndarray:
    """Return the mean log-probability of each text's output tokens, [texts] float32.

    Args:
        lm: the model.
        texts: each with at least one prompt and one output token.
        layer: the block behind which the residual is edited.
        change: the edit; None leaves the model as it is.
    """
    out = np.empty(len(texts), np.float32)
    for batch in batches([len(t.tokens) for t in texts], BATCH_TOKENS):
        ids, mask = padded([texts[i].tokens for i in batch])
        with on_output(lm, layer, change or (lambda x: x)):
            logits = lm.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        every = logits[:, :-1].float().log_softmax(-1)
        taken = every.gather(-1, ids[:, 1:, None])[..., 0]
        for row, i in enumerate(batch):
            text = texts[i]
            out[i] = taken[row, text.prompt_tokens - 1 : len(text.tokens) - 1].mean()
    return out


def contrast(logprob: np.ndarray, label: np.ndarray) -> float:
    """Return how much likelier the positives are than the negatives, in nats per token."""
    return float(logprob[label].mean() - logprob[~label].mean())
