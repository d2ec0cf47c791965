"""Llama Scope: `hyperparams.json` and `checkpoints/final.safetensors`; and its R1 successors.

The first release can be read in two ways, which agree only if decoder rows have norm 1:

- `openmoss`, the authors' own at the time of release (https://github.com/OpenMOSS/Language-Model-SAEs,
  revision 4ec6f0aa): scale by the data set's norm, bring decoder rows to norm 1, then compare with
  the threshold, which is in units of the raw residual.
- `saelens`, SAELens' loader: leaves the decoder's norms out, which moves the threshold.

`openmoss` is read unless the other is stated. Ids found with SAELens keep their meaning under both,
but not their activations: calibrate under the one that serves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from saeguard.sae.checkpoint_info import Layout, Part, SaeInfo
from saeguard.sae.formats.source import (
    Source,
    check_config_sizes,
    flag,
    hooked_layer,
    make_info,
    positive,
    sizes,
    text,
    wrong,
)

CONFIG = "hyperparams.json"
WEIGHTS = "checkpoints/final.safetensors"
R1_CONFIG = "config.json"
R1_WEIGHTS = "sae_weights.safetensors"

_TENSORS = {"encoder.weight": "Nd", "encoder.bias": "N", "decoder.weight": "dN"}


def describe(source: Source) -> SaeInfo:
    """Return the description of a checkpoint of the first release.

    Raises:
        SaeError: it is damaged, or reads something other than the residual stream.
    """
    biased = flag(source, "use_decoder_bias", default=True)
    found = sizes(source, _TENSORS | ({"decoder.bias": "d"} if biased else {}))
    check_config_sizes(source, found, "d_model", "d_sae")
    layer = _layer(source)
    for key, allowed in (
        ("norm_activation", "dataset-wise"),
        ("sparsity_include_decoder_norm", True),
    ):
        if source.config.get(key, allowed) != allowed:
            raise wrong(source, f"{key} is {source.config[key]!r}; Llama Scope's is {allowed!r}")
    if flag(source, "apply_decoder_bias_to_pre_encoder", default=False):
        raise wrong(source, "apply_decoder_bias_to_pre_encoder is set; Llama Scope's is not")
    norms = source.config.get("dataset_average_activation_norm")
    if not isinstance(norms, dict):
        raise wrong(source, f"dataset_average_activation_norm is {norms!r}; `in` and `out` needed")
    root = math.sqrt(found.d_in)
    s_in, s_out = root / positive(source, "in", norms), root / positive(source, "out", norms)
    theta = positive(source, "jump_relu_threshold")
    convention = source.stated.convention or "openmoss"
    chosen = "as stated" if source.stated.convention else "since none is stated"
    parts: Mapping[str, Any] = {
        "W_enc": Part("encoder.weight", 0),
        "W_dec": Part("decoder.weight", 1),
        "b_enc": "encoder.bias",
        "b_dec": "decoder.bias" if biased else None,
    }
    if convention == "openmoss":
        layout = Layout(
            **parts,
            threshold=theta,
            decoder_norm="before_threshold",
            b_enc_factor=1 / s_in,
            W_dec_factor=s_in / s_out,
            b_dec_factor=1 / s_out,
        )
        how = "activations are in units of the decoder rows' norms and of the raw residual"
    else:
        layout = Layout(
            **parts,
            threshold=theta * s_in,
            W_enc_factor=s_in,
            W_dec_factor=1 / s_in,
            b_dec_factor=1 / s_in,
        )
        how = f"the input is multiplied by {s_in:g}; the decoder rows' norms are left out"
    return make_info(
        source,
        found,
        format_="llama_scope",
        architecture="jumprelu",
        layer=layer,
        activation="jumprelu",
        model="meta-llama/Llama-3.1-8B",
        folded=(
            f"convention {convention!r}, {chosen}",
            how,
        ),
        layout=layout,
    )


def describe_r1(source: Source) -> SaeInfo:
    """Return the description of a Llama-Scope-R1-Distill checkpoint; the user states its factor.

    Raises:
        SaeError: it is damaged, or the factor is not stated.
    """
    found = sizes(source, _TENSORS | {"decoder.bias": "d", "log_jumprelu_threshold": "N"})
    check_config_sizes(source, found, "d_model", "d_sae")
    factor = source.stated.norm_factor
    if factor is None:
        raise wrong(
            source,
            "the SAE reads the residual times sqrt(d_model) / its mean norm, and that factor is "
            "not part of the checkpoint; state it: `norm_factor:` in a feature set's `sae:`, "
            "`--norm-factor` of a command (SAELens lists it in pretrained_saes.yaml)",
        )
    return make_info(
        source,
        found,
        format_="llama_scope_r1",
        architecture="jumprelu",
        layer=_layer(source),
        activation="jumprelu",
        model="deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        folded=(f"the input is multiplied by {factor:g}", "the threshold is stored as its log"),
        layout=Layout(
            W_enc=Part("encoder.weight", 0),
            W_dec=Part("decoder.weight", 1),
            b_enc="encoder.bias",
            b_dec="decoder.bias",
            threshold="log_jumprelu_threshold",
            log_threshold=True,
            W_enc_factor=factor,
            W_dec_factor=1 / factor,
            b_dec_factor=1 / factor,
        ),
    )


def _layer(source: Source) -> int:
    hook = text(source, "hook_point_in")
    out = source.config.get("hook_point_out", hook)
    if out != hook:
        raise wrong(
            source,
            f"hook_point_in is {hook!r}, hook_point_out {out!r}: a transcoder, whose input is not "
            "the residual stream; take the `LXR` repository",
        )
    return hooked_layer(source, hook, "hook_point_in")
