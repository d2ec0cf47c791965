"""Check that feature sets were made for the model that vLLM serves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog

from saeguard.features.model_fit import ModelShape, check_fit
from saeguard.features.types import ModelRef
from saeguard.vllm.patches import reads

log = structlog.get_logger("saeguard")

reads(
    "vllm.config:ModelConfig",
    "model",
    "hf_text_config",
    "dtype",
    "quantization",
    why="the width and depth of the model served, its folder, and the type of its weights",
)


def check_models(config: Any, models: Iterable[ModelRef]) -> ModelShape:
    """Return the shape of the served model, after checking that the feature sets were made for it.

    If the model is served with another type or quantisation than a set was calibrated with, or the
    set does not record it, the log warns; it only says so if the set records what that changes.

    Args:
        config: vLLM's `ModelConfig`.
        models: the models that the feature sets were made for.

    Raises:
        ModelFitError: names both shapes, or both digests.
    """
    text = config.hf_text_config
    shape = ModelShape("the model served", int(text.hidden_size), int(text.num_hidden_layers))
    folder = Path(config.model)
    for model in models:
        check_fit(model, shape, folder, at="the feature set")
        if model.sha256 is not None and not folder.is_dir():
            log.warning(
                "saeguard: the model's weights are not compared with the feature set's pin; serve "
                "a folder instead of a name",
                model=config.model,
            )
        served = replace(
            model, dtype=str(config.dtype).removeprefix("torch."), quantization=config.quantization
        )
        measured = dict(model.drift).get(served.arithmetic)
        if served != model:
            report = log.warning if measured is None else log.info
            report(
                "saeguard: the features were calibrated under other arithmetic than the model is "
                "served with",
                model=model.name,
                calibrated=model.arithmetic,
                served=served.arithmetic,
                drift="not measured; `saeguard features drift` measures it"
                if measured is None
                else measured.in_words,
            )
    return shape
