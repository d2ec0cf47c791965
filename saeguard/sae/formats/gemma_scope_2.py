"""Gemma Scope 2, for Gemma 3: `config.json` beside `params.safetensors`.

JumpReLU without input scaling and without subtracting the decoder's bias. `examples.safetensors`,
which lies beside them and is many times larger, is not needed.
"""

from __future__ import annotations

import re

from saeguard.sae.checkpoint_info import Layout, Part, SaeInfo
from saeguard.sae.formats.source import Source, make_info, sizes, stated_layer, text, wrong

CONFIG = "config.json"
WEIGHTS = "params.safetensors"

_BLOCK = re.compile(r"(?:\w+\.)*layers\.(\d{1,4})\.output")


def describe(source: Source) -> SaeInfo:
    """Return the description of a Gemma Scope 2 checkpoint.

    Raises:
        SaeError: it is damaged, or what it computes cannot be computed here.
    """
    architecture = text(source, "architecture")
    if architecture != "jump_relu":
        raise wrong(source, f"architecture is {architecture!r}; Gemma Scope 2's is 'jump_relu'")
    hook = text(source, "hf_hook_point_in")
    block = _BLOCK.fullmatch(hook or "")
    if block is None:
        raise wrong(
            source,
            f"hf_hook_point_in is {hook!r}; the SAE must read the residual stream after a block, "
            "`model.layers.L.output`: take one of `resid_post` or `resid_post_all`",
        )
    decoder = source.weights.tensors.get("w_dec")
    if decoder is not None and len(decoder.shape) != 2:  # noqa: PLR2004 - a matrix
        raise wrong(
            source,
            f"w_dec has {len(decoder.shape)} dimensions: a cross-layer transcoder or a crosscoder, "
            "which reads or writes several layers at once; take one of `resid_post`",
        )
    found = sizes(
        source, {"w_enc": "dN", "b_enc": "N", "threshold": "N", "w_dec": "Nd", "b_dec": "d"}
    )
    return make_info(
        source,
        found,
        format_="gemma_scope_2",
        architecture=architecture,
        layer=stated_layer(source, int(block[1]), ""),
        activation="jumprelu",
        transcoder=text(source, "hf_hook_point_out") not in {None, hook}
        or "affine_skip_connection" in source.weights.tensors,
        model=text(source, "model_name"),
        layout=Layout(
            W_enc=Part("w_enc", 1),
            W_dec=Part("w_dec", 0),
            b_enc="b_enc",
            b_dec="b_dec",
            threshold="threshold",
        ),
    )
