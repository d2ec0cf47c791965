"""Find the decoder layers of a vLLM model, and hook a tap after one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from saeguard.errors import CannotRunError
from saeguard.guard.tap import tap_hook
from saeguard.vllm.patches import assumes, reads

if TYPE_CHECKING:
    from torch import nn

reads(
    "vllm.model_executor.models.utils:PPMissingLayer",
    why="which layers are on this pipeline stage: the others are of this class",
)
reads(
    "vllm.model_executor.models.interfaces:SupportsMultiModal",
    "supports_multimodal",
    "get_language_model",
    why="finding the layers to tap in a model that also reads images or sound",
)
assumes(
    "the decoder layers are one `nn.ModuleList` of `num_hidden_layers` modules",
    why="finding the layers to tap",
)


class ModelError(CannotRunError):
    """The guard does not support this kind of model, or does not find its layers."""


def decoder_layers(model: nn.Module, num_layers: int) -> nn.ModuleList:
    """Return the model's decoder layers, in order; those of other pipeline ranks are placeholders.

    They are the outermost `ModuleList` whose length is `num_layers`. That holds for every family
    looked at: `model.layers`, `transformer.h`, `gpt_neox.layers`. Of a model that also reads images
    or sound, only the part is searched that vLLM itself calls its language model, since an encoder
    may have as many layers.

    Raises:
        ModelError: the model has no such list, or more than one.
    """
    from torch import nn

    found = {
        name: module
        for name, module in language_model(model).named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    }
    outermost = {
        name: module
        for name, module in found.items()
        if not any(name != other and name.startswith(f"{other}.") for other in found)
    }
    if len(outermost) != 1:
        names = ", ".join(outermost) or "no such list"
        raise ModelError(
            f"{type(model).__name__}: expected one list of {num_layers} decoder layers, found "
            f"{names}; this model is not supported"
        )
    layers: nn.ModuleList = next(iter(outermost.values()))
    return layers


def language_model(model: Any) -> nn.Module:
    """Return the part of a model that generates text; the model itself if it only reads text."""
    reads_text_only = not getattr(model, "supports_multimodal", False)
    part: nn.Module = model if reads_text_only else model.get_language_model()
    return part


def is_here(layer: nn.Module) -> bool:
    """Return whether a decoder layer is on this pipeline stage."""
    from vllm.model_executor.models.utils import PPMissingLayer

    return not isinstance(layer, PPMissingLayer)


def hook_layer(layers: nn.ModuleList, index: int) -> Any:
    """Hook the tap after layer `index`; torch.compile traces the hook into the graph."""
    return layers[index].register_forward_hook(tap_hook(index))
