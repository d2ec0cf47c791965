"""dictionary_learning's classes, one row each (https://github.com/saprmarks/dictionary_learning).

The formulas are those of its dictionary.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from saeguard.sae.checkpoint_info import Activation, Layout, Part, SaeInfo
from saeguard.sae.errors import SaeError
from saeguard.sae.formats.source import (
    Sizes,
    Source,
    check_config_sizes,
    hooked_layer,
    kept,
    make_info,
    sizes,
    wrong,
)

_LINEAR = {"encoder.weight": "Nd", "decoder.weight": "dN"}
_PLAIN = {"W_enc": "dN", "b_enc": "N", "W_dec": "Nd", "b_dec": "d"}


def describe(source: Source, values: Mapping[str, Any]) -> SaeInfo:
    """Return the description of a trained dictionary.

    Args:
        source: the tensors, and the trainer's configuration.
        values: numbers and texts that the pickle holds beside tensors.

    Raises:
        SaeError: a class that is not known, or whose tensors or numbers cannot be right.
    """
    trainer = source.config["trainer"]
    class_ = trainer.get("dict_class")
    if class_ not in _CLASSES:
        raise wrong(
            source,
            f"trainer.dict_class is {class_!r}; known: {', '.join(_CLASSES)}. Crosscoders read "
            "several layers or models, and an IdentityDict has no latents",
        )
    source = replace(source, config={**trainer})
    forms = _CLASSES[class_]
    form = next((f for f in forms if f.tensors.keys() <= source.weights.tensors.keys()), forms[-1])
    found = sizes(source, form.tensors)
    layout, k = form.layout, None
    if form.activation == "topk":
        claimed = trainer.get("k", values.get("k"))
        if values.get("k", claimed) != claimed:
            raise wrong(source, f"trainer.k is {claimed!r}, but the weights say {values['k']!r}")
        k = kept(source, claimed, found.d_sae)
    if form.calibrated:
        layout = replace(layout, threshold=_calibrated(source, values))
    model, layer = trainer.get("lm_name"), trainer.get("layer")
    hook, name = f"blocks.{layer}.hook_resid_post", trainer.get("submodule_name")
    if name not in {None, hook, f"resid_post_layer_{layer}"}:
        raise wrong(
            source,
            f"trainer.submodule_name is {name!r}; the residual stream's is "
            f"'resid_post_layer_{layer}'",
        )
    info = make_info(
        source,
        found,
        format_="dictionary_learning",
        architecture=class_,
        layer=hooked_layer(source, hook, "trainer.layer"),
        model=model if isinstance(model, str) else None,
        activation=form.activation,
        k=k,
        folded=form.folded,
        layout=layout,
    )
    check_config_sizes(
        source, Sizes(info.d_in, info.d_sae, info.dtype), "activation_dim", "dict_size"
    )
    return info


def _calibrated(source: Source, values: Mapping[str, Any]) -> float:
    """Return the running threshold; refuse -1, its initial value before any calibration."""
    theta = values.get("threshold")
    if type(theta) not in {int, float} or theta < 0:  # type: ignore[operator]
        raise SaeError(
            f"{source.folder}: threshold is {theta!r}: never calibrated, so that which latents "
            "fire depends on the batch; take a checkpoint from the end of training"
        )
    return float(theta)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class _Form:
    """How one class of dictionary_learning stores its weights."""

    tensors: Mapping[str, str]
    layout: Layout
    activation: Activation
    folded: tuple[str, ...] = ()
    calibrated: bool = False
    """Whether the one threshold is the running one of training."""


_ROWS = partial(Layout, W_enc=Part("encoder.weight", 0), W_dec=Part("decoder.weight", 1))
_COLUMNS = partial(Layout, W_enc=Part("W_enc", 1), W_dec=Part("W_dec", 0))
_NORMS = "activations are in units of the decoder rows' norms"
_BATCH = (
    "b_dec is subtracted from the input",
    "the batch's TopK is replaced by the saved threshold, as the library does",
)
_BATCH_TOP_K = (
    _Form(
        {**_LINEAR, "encoder.bias": "N", "b_dec": "d"},
        _ROWS(b_enc="encoder.bias", subtract="b_dec", b_dec="b_dec"),
        "jumprelu",
        _BATCH,
        calibrated=True,
    ),
    _Form(
        _PLAIN,
        _COLUMNS(b_enc="b_enc", subtract="b_dec", b_dec="b_dec"),
        "jumprelu",
        _BATCH,
        calibrated=True,
    ),
)
"""In Matryoshka SAEs, latents beyond the active groups do not exist; all that are saved do."""
_CLASSES: Mapping[str, tuple[_Form, ...]] = {
    "AutoEncoder": (
        _Form(
            {**_LINEAR, "encoder.bias": "N", "bias": "d"},
            _ROWS(b_enc="encoder.bias", subtract="bias", b_dec="bias"),
            "relu",
            ("bias is subtracted from the input",),
        ),
    ),
    "AutoEncoderNew": (
        _Form(
            {**_LINEAR, "encoder.bias": "N", "decoder.bias": "d"},
            _ROWS(b_enc="encoder.bias", b_dec="decoder.bias"),
            "relu",
        ),
    ),
    "GatedAutoEncoder": (
        _Form(
            {**_LINEAR, "r_mag": "N", "gate_bias": "N", "mag_bias": "N", "decoder_bias": "d"},
            _ROWS(
                b_enc="gate_bias",
                r_mag="r_mag",
                b_mag="mag_bias",
                subtract="decoder_bias",
                b_dec="decoder_bias",
                decoder_norm="after_threshold",
            ),
            "gated",
            ("decoder_bias is subtracted from the input", _NORMS),
        ),
    ),
    "JumpReluAutoEncoder": (
        _Form(
            {**_PLAIN, "threshold": "N"},
            _COLUMNS(
                b_enc="b_enc",
                b_dec="b_dec",
                threshold="threshold",
                decoder_norm="after_threshold",
            ),
            "jumprelu",
            (_NORMS,),
        ),
    ),
    "AutoEncoderTopK": (
        _Form(
            {**_LINEAR, "encoder.bias": "N", "b_dec": "d"},
            _ROWS(b_enc="encoder.bias", subtract="b_dec", b_dec="b_dec"),
            "topk",
            ("b_dec is subtracted from the input",),
        ),
    ),
    "BatchTopKSAE": _BATCH_TOP_K,
    "MatryoshkaBatchTopKSAE": _BATCH_TOP_K,
}
