"""Which positions of a prompt hold embeddings: their token ids say nothing about their content.

Embeddings come from a client (`--enable-prompt-embeds`) or from the encoder of an image, a sound or
a video. vLLM keeps some token id there: a placeholder, 0, or, on Model Runner V1, an id of the
request that had the place in the batch before. So no decision may rest on that id.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from saeguard.vllm.patches import reads

NO_TOKEN = -2
"""Stands for a token without an id, where token ids are compared with marks; -1 has a meaning."""

for prompt in ("vllm.v1.request:Request", "vllm.v1.core.sched.output:NewRequestData"):
    reads(
        prompt,
        "prompt_token_ids",
        "prompt_embeds",
        "mm_features",
        why="which positions of a prompt hold embeddings in place of tokens",
        either=(("prompt_is_token_ids",), ("prompt_embeds",)),
        differs="has `prompt_is_token_ids` if token ids and embeddings can be mixed in a prompt",
    )
reads(
    "vllm.multimodal.inputs:MultiModalFeatureSpec",
    "mm_position",
    why="which positions of a prompt hold an image, a sound or a video",
)
reads(
    "vllm.multimodal.inputs:PlaceholderRange",
    "offset",
    "length",
    "is_embed",
    why="which positions of a prompt hold an image, a sound or a video",
)


def embedded_positions(prompt: Any) -> np.ndarray | None:
    """Return which positions of a prompt hold embeddings, [prompt tokens] bool; None if none do.

    Args:
        prompt: vLLM's `Request` or `NewRequestData`.
    """
    ids, embeds = prompt.prompt_token_ids, prompt.prompt_embeds
    if embeds is None and not prompt.mm_features:
        return None
    if ids is None:
        return np.ones(len(embeds), bool)
    embedded = np.zeros(len(ids), bool)
    is_token = getattr(prompt, "prompt_is_token_ids", None)
    if embeds is not None:
        embedded |= True if is_token is None else ~np.asarray(is_token, bool)
    for feature in prompt.mm_features or ():
        where = feature.mm_position
        part = embedded[where.offset : where.offset + where.length]
        part |= True if where.is_embed is None else where.is_embed.numpy()[: len(part)]
    return embedded
