"""Families that are published as pickles, recognised by the names of their tensors.

Only `saeguard sae convert` comes here, with the tensors already out of the pickle. A transcoder or
crosscoder among them is refused as what it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from saeguard.sae.checkpoint_info import Layout, Part, SaeInfo
from saeguard.sae.errors import SaeError
from saeguard.sae.formats import dictionary_learning
from saeguard.sae.formats.source import Source, kept, make_info, sizes, stated_layer

_GOODFIRE_LAYER = re.compile(r"-SAE-l(\d{1,3})\.pth?$")
_QWEN_LAYER = re.compile(r"^layer(\d{1,3})\.sae\.pt$")
_QWEN_K = re.compile(r"-L0_(\d{1,6})(?:$|/)")


def describe(source: Source, name: str, values: Mapping[str, Any]) -> SaeInfo:
    """Return the description of the checkpoint whose tensors a pickle holds.

    Args:
        source: the tensors, and the configuration beside the pickle if there was one.
        name: of the pickle's file, and of the repository if it is known.
        values: numbers and texts that the pickle holds beside tensors.

    Raises:
        SaeError: no family has these tensors, more than one has, or they cannot be read rightly.
    """
    names = set(source.weights.tensors)
    if isinstance(source.config.get("trainer"), dict):
        return dictionary_learning.describe(source, values)
    if {"encoder_linear.weight", "decoder_linear.weight"} <= names:
        return _goodfire(source, name)
    if {"pre_bias", "latent_bias", "encoder.weight", "decoder.weight"} <= names:
        return _openai(source, values)
    if {"W", "b_enc", "b_dec"} <= names and "W_enc" not in names:
        raise SaeError(
            f"{source.folder}: a tied SAE whose TopK runs over the whole batch, with no threshold "
            "saved (Goodfire's for DeepSeek-R1): a latent would depend on the other requests"
        )
    if {"W_enc", "W_dec", "b_enc", "b_dec"} == names:
        return _qwen_scope(source, name)
    if names & {"encoder.weight", "bias", "gate_bias", "threshold"}:
        raise SaeError(
            f"{source.folder}: tensors {', '.join(sorted(names))} are dictionary_learning's or one "
            "of several others'; its config.json says which: put it beside the file, or name it "
            "with --config"
        )
    raise SaeError(
        f"{source.folder}: no known family has tensors {', '.join(sorted(names))[:300]}; known: "
        "Goodfire, dictionary_learning, OpenAI, Qwen-Scope"
    )


def _goodfire(source: Source, name: str) -> SaeInfo:
    """Describe Llama-3.1-8B-Instruct-SAE-l19 and Llama-3.3-70B-Instruct-SAE-l50 (model cards)."""
    found = sizes(
        source,
        {
            "encoder_linear.weight": "Nd",
            "encoder_linear.bias": "N",
            "decoder_linear.weight": "dN",
            "decoder_linear.bias": "d",
        },
    )
    match = _GOODFIRE_LAYER.search(name)
    return make_info(
        source,
        found,
        format_="goodfire",
        architecture="standard",
        layer=stated_layer(source, int(match[1]) if match else None, "keep the published name"),
        activation="relu",
        layout=Layout(
            W_enc=Part("encoder_linear.weight", 0),
            W_dec=Part("decoder_linear.weight", 1),
            b_enc="encoder_linear.bias",
            b_dec="decoder_linear.bias",
        ),
    )


def _openai(source: Source, values: Mapping[str, Any]) -> SaeInfo:
    """Describe OpenAI's SAEs of GPT-2 (https://github.com/openai/sparse_autoencoder, model.py)."""
    found = sizes(
        source,
        {"encoder.weight": "Nd", "decoder.weight": "dN", "latent_bias": "N", "pre_bias": "d"},
    )
    activation = values.get("activation", "TopK")
    normed = activation in {"TopK", "TopKActivation"}
    if not normed and activation != "ReLU":
        raise SaeError(f"{source.folder}: activation is {activation!r}; known: TopK, ReLU")
    k = None
    if normed:
        k = kept(source, values.get("activation_state_dict.k", source.stated.k), found.d_sae)
    return make_info(
        source,
        found,
        format_="openai",
        architecture="topk" if normed else "standard",
        layer=stated_layer(source, None, "the folder it is published in names it"),
        activation="topk" if normed else "relu",
        k=k,
        norm="layer_norm" if normed else "none",
        eps=1e-5 if normed else 0.0,
        model="gpt2",
        folded=("pre_bias is subtracted from the normalised input",),
        layout=Layout(
            W_enc=Part("encoder.weight", 0),
            W_dec=Part("decoder.weight", 1),
            b_enc="latent_bias",
            subtract="pre_bias",
            b_dec="pre_bias",
        ),
    )


def _qwen_scope(source: Source, name: str) -> SaeInfo:
    """Describe Qwen-Scope (https://arxiv.org/abs/2605.11887); k is in the repository's name."""
    found = sizes(source, {"W_enc": "Nd", "W_dec": "dN", "b_enc": "N", "b_dec": "d"})
    layer = _QWEN_LAYER.match(name.rsplit("/", 1)[-1])
    named = _QWEN_K.search(name.rsplit("/", 1)[0])
    k, stated = int(named[1]) if named else None, source.stated.k
    if k is None and stated is None:
        raise SaeError(
            f"{source.folder}: k is part of the repository's name only (`-L0_50` is 50); state it "
            "with --k"
        )
    return make_info(
        source,
        found,
        format_="qwen_scope",
        architecture="topk",
        layer=stated_layer(
            source, int(layer[1]) if layer else None, "keep the published name, `layerL.sae.pt`"
        ),
        activation="topk",
        k=kept(source, stated if k is None else k, found.d_sae),
        relu_after_topk=False,
        layout=Layout(W_enc=Part("W_enc", 0), W_dec=Part("W_dec", 1), b_enc="b_enc", b_dec="b_dec"),
    )
