"""Load a causal language model and find the decoder layers whose output is `resid_post`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from saeguard.errors import InputError
from saeguard.features.model_fit import ModelShape, check_fit, name_of
from saeguard.features.types import FeatureSet
from saeguard.real_path import real_path

LAYER_PATHS = (
    "model.layers",  # Llama, Mistral, Qwen, Gemma, OLMo, Phi
    "model.language_model.layers",  # vision-language wrappers
    "language_model.model.layers",
    "model.model.layers",
    "model.text_model.layers",
    "gpt_neox.layers",
    "transformer.h",  # GPT-2, GPT-J, Falcon
    "transformer.blocks",  # MPT
    "model.decoder.layers",  # OPT
)


Dtype: TypeAlias = Literal["float32", "bfloat16", "float16"]
"""Types of a model's weights."""


class ModelError(InputError):
    """A model cannot be loaded or read; the message says what to do."""


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """A causal language model with its tokenizer and decoder layers."""

    path: Path
    model: Any
    tokenizer: Any
    layers: nn.ModuleList

    @property
    def name(self) -> str:
        """The model's name in feature sets: the folder's, or that on the hub."""
        return name_of(self.path)

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def shape(self) -> ModelShape:
        """Name, width and depth."""
        return ModelShape(self.name, self.hidden_size, len(self.layers))

    @property
    def special_tokens(self) -> tuple[int, ...]:
        """Ids of BOS, padding and the like, whose residuals are far from those of text."""
        return tuple(sorted(self.tokenizer.all_special_ids))


def find_layers(model: nn.Module) -> nn.ModuleList:
    """Return the decoder layers of `model`.

    Raises:
        ModelError: the family's layout is not known.
    """
    for path in LAYER_PATHS:
        module: Any = model
        for name in path.split("."):
            module = getattr(module, name, None)
        if isinstance(module, nn.ModuleList):
            return module
    raise ModelError(
        f"{type(model).__name__}: the decoder layers were not found; looked at "
        f"{', '.join(LAYER_PATHS)}"
    )


def load_tokenizer(path: str | Path) -> Any:
    """Load the tokenizer in folder `path`, to check texts before the weights are loaded.

    Raises:
        ModelError: the folder does not hold a model with a tokenizer.
    """
    # It takes seconds to import, and commands without a model must not wait.
    from transformers import AutoTokenizer  # noqa: PLC0415

    with _reported(path) as folder:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def load_model(
    path: str | Path, tokenizer: Any = None, *, dtype: Dtype = "float32", device: str = "cpu"
) -> LanguageModel:
    """Load the model in folder `path`; nothing is downloaded.

    Args:
        path: of the model.
        tokenizer: its tokenizer, if it has been loaded already.
        dtype: of its weights.
        device: as torch names it, or `auto`.

    Raises:
        ModelError: the folder does not hold a causal language model with safetensors weights, or
            there is no such device.
    """
    device = choose_device(device)
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415 - as above

    with _reported(path) as folder:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        # Transformers' default attention leaves out Gemma 2's soft cap; vLLM does not.
        capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            use_safetensors=True,
            attn_implementation="eager" if capped else None,
        )
    if tokenizer is None:
        tokenizer = load_tokenizer(path)
    return LanguageModel(folder, model.eval().to(device), tokenizer, find_layers(model))


def choose_device(wanted: str) -> str:
    """Return the device for `auto`, or the one that is named.

    Raises:
        ModelError: there is no such device.
    """
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=wanted)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise ModelError(f"--device: found {wanted!r}, which cannot be used: {why}") from error
    return wanted


@contextmanager
def _reported(path: str | Path) -> Iterator[Path]:
    """Yield the folder of a model, and turn errors of Transformers into a `ModelError`."""
    folder = real_path(path)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{path}: no config.json; give the folder of a Hugging Face model")
    try:
        yield folder
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise ModelError(f"{path}: Transformers cannot load it: {error}") from error


def check_model(lm: LanguageModel, features: FeatureSet) -> None:
    """Check that a model has the shape that a feature set was made for.

    Raises:
        ModelFitError: names both shapes.
    """
    check_fit(features.model, lm.shape, at=f"{features.path}: the feature set")
