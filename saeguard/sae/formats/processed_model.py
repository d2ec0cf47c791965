"""Read how SAELens changed the model's weights before it trained the SAE on it.

`model_from_pretrained_kwargs` holds the arguments of TransformerLens'
`HookedTransformer.from_pretrained_no_processing`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from saeguard.sae.checkpoint_info import Norm
from saeguard.sae.formats.source import Source, wrong

KEY = "model_from_pretrained_kwargs"
CENTRE = "center_writing_weights"
SAME = frozenset({
    "fold_ln", "center_unembed", "fold_value_biases", "refactor_factored_attn_matrices", "device",
    "n_devices", "dtype", "torch_dtype", "default_prepend_bos", "default_padding_side",
    "first_n_layers", "move_to_device", "trust_remote_code", "local_files_only", "n_ctx",
})  # fmt: skip
"""Arguments that leave the residual stream as it is, up to rounding."""
LAYER_NORM = re.compile(
    r"(openai-community/)?gpt2(-small|-medium|-large|-xl)?|(distilbert/)?distilgpt2"
    r"|(EleutherAI/)?(pythia|gpt-neo|gpt-j)-.*|(roneneldan/)?tiny-?stories-.*",
    re.IGNORECASE,
)
"""Models whose every norm subtracts the mean, so that centring changes nothing but the mean."""
RMS_NORM = re.compile(
    r"(.*/)?(meta-)?(llama|gemma|mistral|mixtral|qwen|smollm|olmo-2|phi-3).*", re.IGNORECASE
)
"""Models whose norms do not subtract the mean: TransformerLens leaves them as they are."""


def is_centred(source: Source, metadata: Mapping[str, Any], norm: Norm) -> bool:
    """Return whether the SAE reads the residual stream without each token's mean.

    TransformerLens' `center_writing_weights` subtracts from every matrix and bias that writes to
    the residual stream its mean over the stream's coordinates. If every norm of the model subtracts
    the mean anyway, the stream changes by its mean and nothing else.

    Raises:
        SaeError: the weights were changed in another way, or it is not known what centring does to
            the model.
    """
    given = metadata.get(KEY, source.config.get(KEY))
    if given is None:
        return False
    if not isinstance(given, dict):
        raise wrong(source, f"{KEY} is {given!r}; an object is needed")
    for name, value in given.items():
        if name not in SAME | {CENTRE} and value not in {None, False}:
            raise wrong(
                source,
                f"{KEY} has {name}: {value!r}, and it is not known what that does to the residual "
                "stream; if the SAE was trained on the model as it is served, remove the key",
            )
    if not given.get(CENTRE):
        return False
    model = metadata.get("model_name", source.config.get("model_name"))
    if isinstance(model, str) and RMS_NORM.fullmatch(model):
        return False
    if not isinstance(model, str) or not LAYER_NORM.fullmatch(model):
        raise wrong(
            source,
            f"{KEY} has {CENTRE}: true, and whether the norms of {model!r} subtract the mean is "
            "not known, on which it depends what the SAE reads",
        )
    if norm == "constant_norm_rescale":
        raise wrong(
            source,
            f"{KEY} has {CENTRE}: true beside normalize_activations {norm!r}, which would need the "
            "norm of a token without its mean; that is not computed",
        )
    return True
