"""SAELens: `cfg.json` beside `sae_weights.safetensors`.

Written by `SAE.save_model` (https://github.com/decoderesearch/SAELens), in its present form and in
the flat one from before version 6. BatchTopK and Matryoshka SAEs are saved as `jumprelu`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from saeguard.sae.checkpoint_info import Activation, Layout, Norm, Part, SaeInfo
from saeguard.sae.errors import SaeError
from saeguard.sae.formats.processed_model import is_centred
from saeguard.sae.formats.source import (
    Source,
    check_config_sizes,
    flag,
    hooked_layer,
    kept,
    make_info,
    positive,
    sizes,
    wrong,
)

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"

_COMMON = {"W_enc": "dN", "b_enc": "N", "W_dec": "Nd", "b_dec": "d"}
TENSORS: Mapping[str, Mapping[str, str]] = {
    "standard": _COMMON,
    "jumprelu": {**_COMMON, "threshold": "N"},
    "gated": {
        "W_enc": "dN", "W_dec": "Nd", "b_dec": "d", "b_gate": "N", "b_mag": "N", "r_mag": "N",
    },
    "topk": _COMMON,
    "transcoder": {"W_enc": "dN", "b_enc": "N"},
    "skip_transcoder": {"W_enc": "dN", "b_enc": "N"},
    "jumprelu_transcoder": {"W_enc": "dN", "b_enc": "N", "threshold": "N"},
    "jumprelu_skip_transcoder": {"W_enc": "dN", "b_enc": "N", "threshold": "N"},
}  # fmt: skip
"""Tensors that are read of each architecture; d is the residual's width, N the latents."""

REFUSED: Mapping[str, str] = {
    "abstopk": "it keeps the largest absolute values, so that a latent can be strongly negative",
    "matching_pursuit": "its latents come one after the other, each from what the last one left",
    "temporal": "a latent depends on the tokens before, through attention of its own",
    "batchtopk": "its latents depend on the batch; save it with `save_inference_model`",
    "matryoshka_batchtopk": "its latents depend on the batch; save it with `save_inference_model`",
}

EPS = 1e-5
"""Of layer_norm; `SAE._setup_activation_normalization`."""


def describe(source: Source) -> SaeInfo:
    """Return the description of a SAELens checkpoint.

    Raises:
        SaeError: it is damaged, or what it computes cannot be computed here.
    """
    architecture = _architecture(source)
    transcoder = "transcoder" in architecture
    found = sizes(source, TENSORS[architecture])
    check_config_sizes(source, found, "d_in", "d_sae")
    _refuse_extras(source)
    metadata = source.config.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    norm, factor = _normalisation(source)
    centred = is_centred(source, metadata, norm)
    subtracts = flag(source, "apply_b_dec_to_input", default=True) and not transcoder
    rescales = architecture == "topk" and flag(
        source, "rescale_acts_by_decoder_norm", default=False
    )
    k = None
    if architecture == "topk":
        arguments = source.config.get("activation_fn_kwargs")
        arguments = arguments if isinstance(arguments, dict) else {}
        k = kept(source, source.config.get("k", arguments.get("k")), found.d_sae)
    jumps = architecture.startswith("jumprelu")
    activations: dict[str, Activation] = {"gated": "gated", "topk": "topk"}
    return make_info(
        source,
        found,
        format_="saelens",
        architecture=architecture,
        layer=hooked_layer(
            source,
            metadata.get(
                "hook_name", source.config.get("hook_name", source.config.get("hook_point"))
            ),
        ),
        activation=activations.get(architecture, "jumprelu" if jumps else "relu"),
        k=k,
        norm=norm,
        eps=EPS if norm == "layer_norm" else 0.0,
        transcoder=transcoder,
        model=_model(metadata, source.config),
        folded=(
            *(["each token's mean is subtracted from the input"] if centred else []),
            *(["b_dec is subtracted from the input"] if subtracts else []),
            *([f"the input is multiplied by {factor:g}"] if factor != 1 else []),
            *(["activations are in units of the decoder rows' norms"] if rescales else []),
        ),
        layout=Layout(
            W_enc=Part("W_enc", 1),
            W_dec=Part("W_dec", 0),
            b_enc="b_gate" if architecture == "gated" else "b_enc",
            subtract="b_dec" if subtracts else None,
            centred=centred,
            b_dec="b_dec",
            threshold="threshold" if jumps else None,
            r_mag="r_mag" if architecture == "gated" else None,
            b_mag="b_mag" if architecture == "gated" else None,
            decoder_norm="before_threshold" if rescales else "none",
            W_enc_factor=factor,
            W_dec_factor=1 / factor,
            b_dec_factor=1 / factor,
        ),
    )


def _architecture(source: Source) -> str:
    name = source.config.get("architecture", "standard")
    # Before SAELens 6, TopK was an activation function of the standard architecture.
    if source.config.get("activation_fn", source.config.get("activation_fn_str")) == "topk":
        name = "topk"
    if isinstance(name, str) and name in REFUSED:
        raise wrong(source, f"architecture {name!r} cannot be watched: {REFUSED[name]}")
    if not isinstance(name, str) or name not in TENSORS:
        raise wrong(source, f"architecture {name!r} is not recognised; known: {', '.join(TENSORS)}")
    return name


def _normalisation(source: Source) -> tuple[Norm, float]:
    """Return the normalisation of each token, and the factor that is the same for all tokens."""
    value = source.config.get("normalize_activations", "none")
    value = {None: "none", False: "none", True: "expected_average_only_in"}.get(value, value)
    if value == "none":
        return "none", 1.0
    if value == "expected_average_only_in":
        if source.stated.norm_factor is None:
            raise wrong(
                source,
                "normalize_activations is 'expected_average_only_in', but its factor is not part "
                "of the checkpoint; state it (`norm_factor:` in a feature set's `sae:`, "
                "`--norm-factor` of a command), or fold it in with SAELens "
                "(`sae.fold_activation_norm_scaling_factor(factor)`) and save the SAE again",
            )
        return "none", source.stated.norm_factor
    if value == "constant_scalar_rescale":
        return "none", positive(source, "activation_normalization_factor")
    if value == "covariance_whitening":
        raise wrong(
            source,
            "normalize_activations is 'covariance_whitening', whose matrix is not part of the "
            "checkpoint; fold it in with SAELens (`sae.fold_activation_whitening`) and save again",
        )
    if value in {"layer_norm", "constant_norm_rescale"}:
        return value, 1.0
    raise wrong(
        source,
        f"normalize_activations {value!r} is not recognised; known: none, "
        "expected_average_only_in, constant_scalar_rescale, constant_norm_rescale, layer_norm",
    )


def _refuse_extras(source: Source) -> None:
    tensors = source.weights.tensors
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        if name in tensors and not bool((source.weights.all(name) == 1).all()):
            raise SaeError(
                f"{source.weights.path}: {name} differs from 1; SAELens 6 stores it but does not "
                "apply it, so what the latents are is open. Remove it, or fold it into the "
                "decoder, and save the SAE again"
            )
    reshape = source.config.get("reshape_activations", "none")
    if reshape not in {None, "none"}:
        raise wrong(source, f"reshape_activations is {reshape!r}; a residual needs none")


def _model(metadata: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    name = metadata.get("model_name", config.get("model_name"))
    return name if isinstance(name, str) else None
