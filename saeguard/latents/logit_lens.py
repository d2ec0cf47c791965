"""The logit lens: which next tokens a latent's decoder row makes likelier, read directly.

The row goes through the model's final norm and its unembedding, as if no layer came after it
(nostalgebraist 2020). A norm scales its input to one length, so the values are logits per unit of
the row's root mean square: they rank tokens, and do not say how much a latent does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from saeguard.hf.model import LanguageModel, ModelError
from saeguard.sae import SaeInfo, read_decoder_rows

NORMS = (
    "norm",  # Llama, Mistral, Qwen, Gemma
    "ln_f",  # GPT-2, GPT-J, Falcon
    "final_layer_norm",  # GPT-NeoX, OPT
    "final_layernorm",  # Phi
    "norm_f",  # MPT
    "decoder.final_layer_norm",
    "language_model.norm",
    "text_model.norm",
)
TOKENS = 10
ROWS = 256


class Lens(NamedTuple):
    """The tokens of some latents, from the first on."""

    latent: int
    """The first."""
    up: np.ndarray
    """[latents, tokens] ids of the tokens that gain most, first the most."""
    up_value: np.ndarray
    """[latents, tokens]"""
    down: np.ndarray
    """[latents, tokens] ids of those that lose most."""
    down_value: np.ndarray
    """[latents, tokens]"""


def final_norm(lm: LanguageModel) -> Any:
    """Return the module that normalises the residual before the unembedding.

    Raises:
        ModelError: the family's layout is not known.
    """
    for path in NORMS:
        module: Any = lm.model.base_model
        for name in path.split("."):
            module = getattr(module, name, None)
        if isinstance(module, torch.nn.Module):
            return module
    raise ModelError(f"{lm.path}: the final norm was not found; looked at {', '.join(NORMS)}")


@torch.no_grad()
def lens_logits(lm: LanguageModel, directions: torch.Tensor) -> torch.Tensor:
    """Return what each direction [n, d] adds to the logits, [n, vocabulary] float32."""
    norm, device, dtype = final_norm(lm), lm.model.device, lm.model.dtype
    x = directions.to(device, dtype)
    # A norm's own bias is no effect of the direction.
    normed = norm(x) - norm(torch.zeros_like(x[:1]))
    unembed = lm.model.get_output_embeddings().weight
    logits: torch.Tensor = (normed @ unembed.t()).float().cpu()
    return logits


def logit_lens(
    lm: LanguageModel, info: SaeInfo, done: Callable[[int], object] = lambda _count: None
) -> Iterator[Lens]:
    """Yield the tokens of all latents, `ROWS` latents at a time.

    Args:
        lm: the model.
        info: its SAE.
        done: called with the number of latents since the last call.

    Raises:
        ModelError: the family's layout is not known.
        SaeError: the SAE is a transcoder, or damaged.
    """
    for start in range(0, info.d_sae, ROWS):
        latents = range(start, min(start + ROWS, info.d_sae))
        logits = lens_logits(lm, read_decoder_rows(info, latents))
        most = min(TOKENS, logits.shape[1])
        up, down = logits.topk(most), (-logits).topk(most)
        done(len(latents))
        yield Lens(
            start,
            up.indices.numpy().astype(np.int32),
            up.values.numpy(),
            down.indices.numpy().astype(np.int32),
            (-down.values).numpy(),
        )
