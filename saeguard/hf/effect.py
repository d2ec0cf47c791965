"""Measure what clamping latents does to what the model would write."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from saeguard.hf.model import LanguageModel
from saeguard.hf.record import BATCH_TOKENS, batches, on_output, padded
from saeguard.hf.texts import Text
from saeguard.sae import EncoderRows, activate


@torch.no_grad()
def output_logprob(
    lm: LanguageModel,
    texts: Sequence[Text],
    layer: int | None = None,
    rows: EncoderRows | None = None,
    W_dec: torch.Tensor | None = None,
    target: torch.Tensor | None = None,
) -> np.ndarray:
    """Return the mean log-probability of each text's output tokens, [texts] float32.

    Args:
        lm: the model.
        texts: each with at least one prompt and one output token.
        layer: where to clamp; None clamps nothing.
        rows: encoder of the clamped latents.
        W_dec: [latents, d_in] their decoder rows.
        target: [latents] what they are set to, at every token.
    """
    out = np.empty(len(texts), np.float32)

    def change(x: torch.Tensor) -> torch.Tensor:
        if rows is None or W_dec is None or target is None:
            return x
        f = activate(rows, x.reshape(-1, x.shape[-1]))
        return x + ((target - f) @ W_dec).reshape(x.shape)

    for batch in batches([len(t.tokens) for t in texts], BATCH_TOKENS):
        ids, mask = padded([texts[i].tokens for i in batch])
        with on_output(lm, layer or 0, change):
            logits = lm.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        logprob = logits[:, :-1].float().log_softmax(-1)
        logprob = logprob.gather(-1, ids[:, 1:, None])[..., 0]
        for row, i in enumerate(batch):
            text = texts[i]
            out[i] = logprob[row, text.prompt_tokens - 1 : len(text.tokens) - 1].mean()
    return out


def contrast(logprob: np.ndarray, label: np.ndarray) -> float:
    """Return how much likelier the positives are than the negatives, in nats per token."""
    return float(logprob[label].mean() - logprob[~label].mean())
