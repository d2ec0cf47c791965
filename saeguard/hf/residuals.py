"""Record the residual stream after decoder layers, for many texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from saeguard.hf.model import LanguageModel, ModelError

BATCH_TOKENS = 4096
"""Tokens of one forward pass, padding included."""


@contextmanager
def on_output(
    lm: LanguageModel, layer: int, change: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Replace the residual after block `layer`, [batch, tokens, d], by the result of `change`.

    Layers return a tensor or a tuple that starts with it, by family and version. The last entry
    of `output_hidden_states` would be read after the final norm; a hook never is.

    Raises:
        ModelError: there is no such layer.
    """
    if not 0 <= layer < len(lm.layers):
        raise ModelError(f"{lm.path}: there is no layer {layer}; it has {len(lm.layers)}")

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    handle = lm.layers[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def record(
    lm: LanguageModel,
    texts: Sequence[Sequence[int]],
    layers: Sequence[int],
    *,
    batch_tokens: int = BATCH_TOKENS,
) -> Iterator[tuple[int, Mapping[int, torch.Tensor]]]:
    """Yield `(index of the text, {layer: resid_post [tokens, d] float32})`, shortest text first.

    Texts of similar length share a batch and are padded on the right. Causal attention does not see
    that padding, so the values are those of each text alone.

    Args:
        lm: the model.
        texts: token ids; empty texts are passed over.
        layers: `resid_post` of these blocks.
        batch_tokens: bound on the tokens of one forward pass; a longer text goes alone.
    """
    kept: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def change(x: torch.Tensor) -> torch.Tensor:
            kept[layer] = x.detach().float().cpu()
            return x

        return change

    with ExitStack() as stack:
        for layer in dict.fromkeys(layers):
            stack.enter_context(on_output(lm, layer, keep(layer)))
        for batch in batches([len(t) for t in texts], batch_tokens):
            forward(lm, [texts[i] for i in batch])
            for row, i in enumerate(batch):
                yield i, {layer: x[row, : len(texts[i])].clone() for layer, x in kept.items()}


def forward(lm: LanguageModel, texts: Sequence[Sequence[int]]) -> None:
    """Run the decoder on a batch of token ids, padded on the right; the head is left out."""
    ids, mask = (part.to(lm.model.device) for part in padded(texts))
    lm.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)


def padded(texts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask [texts, longest] int64, padded on the right."""
    longest = max(map(len, texts))
    ids = torch.zeros(len(texts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
        mask[row, : len(text)] = 1
    return ids, mask


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Group texts by length, so that the padded batch stays within `batch_tokens`."""
    batch: list[int] = []
    for i in sorted((i for i, n in enumerate(lengths) if n), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[i] > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
