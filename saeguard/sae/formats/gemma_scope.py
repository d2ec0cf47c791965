"""Gemma Scope, for Gemma 2: `layer_L/width_W/average_l0_K/params.npz`.

JumpReLU without input scaling and without subtracting the decoder's bias (Lieberum et al. 2024,
https://arxiv.org/abs/2408.05147). The file does not state the layer; the folders it is
published in do.
"""

from __future__ import annotations

import re
from dataclasses import replace

from saeguard.sae.checkpoint_info import Layout, Part, SaeInfo
from saeguard.sae.errors import SaeError
from saeguard.sae.formats.source import Source, make_info, sizes, stated_layer

WEIGHTS = "params.npz"

_LAYER = re.compile(r"layer_(\d{1,4})")
_KIND = re.compile(r"gemma-scope-\w+-(?:pt|it)-(att|mlp|transcoders)")


def describe(source: Source) -> SaeInfo:
    """Return the description of a Gemma Scope checkpoint.

    Raises:
        SaeError: it is damaged, or reads something other than the residual stream.
    """
    names = source.folder.parts
    for name in names:
        if (kind := _KIND.search(name)) is not None:
            raise SaeError(
                f"{source.folder}: Gemma Scope's {kind[1]!r} SAEs do not read the residual "
                "stream; take the `res` repository of the same model"
            )
    if "embedding" in names[-3:]:
        raise SaeError(
            f"{source.folder}: an SAE of the embeddings, which are not read; take a layer's"
        )
    # Released names are W_enc and so on; SAELens accepts w_enc as well.
    spelt = {name.replace("w_", "W_", 1): name for name in source.weights.tensors}
    tensors = {name: source.weights.tensors[old] for name, old in spelt.items()}
    weights = replace(source.weights, tensors=tensors)
    found = sizes(
        replace(source, weights=weights),
        {"W_enc": "dN", "b_enc": "N", "threshold": "N", "W_dec": "Nd", "b_dec": "d"},
    )
    layers = [int(match[1]) for name in names if (match := _LAYER.fullmatch(name))]
    return make_info(
        source,
        found,
        format_="gemma_scope",
        architecture="jumprelu",
        layer=stated_layer(
            source,
            layers[-1] if layers else None,
            "keep the folders it is published in, layer_L/width_W/average_l0_K",
        ),
        activation="jumprelu",
        layout=Layout(
            W_enc=Part(spelt["W_enc"], 1),
            W_dec=Part(spelt["W_dec"], 0),
            b_enc="b_enc",
            b_dec="b_dec",
            threshold="threshold",
        ),
    )
