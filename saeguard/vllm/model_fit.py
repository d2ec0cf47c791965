"""Check that feature sets were made for the model that vLLM serves."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from saeguard.features.model_fit import ModelShape, check_fit
from saeguard.features.types import ModelRef
from saeguard.vllm.patches import reads

reads(
    "vllm.config:ModelConfig",
    "model",
    "hf_text_config",
    why="the width and depth of the model served, and its folder",
)


def check_models(config: Any, models: Iterable[ModelRef]) -> ModelShape:
    """Return the shape of the served model, after checking that the feature sets were made for it.

    Args:
        config: vLLM's `ModelConfig`.
        models: the models that the feature sets were made for.

    Raises:
        ModelFitError: names both shapes, or both digests.
    """
    text = config.hf_text_config
    shape = ModelShape("the model served", int(text.hidden_size), int(text.num_hidden_layers))
    for model in models:
        check_fit(model, shape, Path(config.model), at="the feature set")
    return shape
