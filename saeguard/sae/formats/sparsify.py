"""EleutherAI's sparsify: `HOOKPOINT/cfg.json` beside `sae.safetensors`.

TopK or GroupMax of `relu(W (x - b_dec) + b)` (https://github.com/EleutherAI/sparsify,
`SparseCoder.encode`). Only the name of the folder states the layer: `layers.10` is the
output of block 10.
"""

from __future__ import annotations

import re

from saeguard.sae.checkpoint_info import Layout, Part, SaeInfo
from saeguard.sae.errors import SaeError
from saeguard.sae.formats.source import (
    Source,
    flag,
    kept,
    make_info,
    sizes,
    stated_layer,
    text,
    wrong,
)

CONFIG = "cfg.json"
WEIGHTS = "sae.safetensors"

_BLOCK = re.compile(r"(?:\w+\.)*(?:layers|h)\.(\d{1,4})")
_MODULE = re.compile(r"(?:\w+\.)*(?:layers|h)\.\d{1,4}\..+|(?:\w+\.)*embed\w*")


def describe(source: Source) -> SaeInfo:
    """Return the description of a sparsify checkpoint.

    Raises:
        SaeError: it is damaged, or reads something other than the residual stream.
    """
    transcodes = flag(source, "transcode", default=False)
    found = sizes(
        source, {"encoder.weight": "Nd", "encoder.bias": "N", "b_dec": "d", "W_dec": "Nd"}
    )
    _check_sizes(source, found.d_in, found.d_sae)
    activation = text(source, "activation") or "topk"
    k = kept(source, source.config.get("k"), found.d_sae)
    if activation == "groupmax":
        if found.d_sae % k:
            raise wrong(source, f"k is {k}; groupmax needs a divisor of {found.d_sae} latents")
    elif activation != "topk":
        raise wrong(source, f"activation is {activation!r}; known: topk, groupmax")
    if flag(source, "signed", default=False):
        raise wrong(source, "signed is set: a latent can be negative, which cannot be watched")
    return make_info(
        source,
        found,
        format_="sparsify",
        architecture=activation,
        layer=_layer(source, transcodes=transcodes),
        activation="groupmax" if activation == "groupmax" else "topk",
        k=k,
        transcoder=transcodes or "W_skip" in source.weights.tensors,
        folded=() if transcodes else ("b_dec is subtracted from the input",),
        layout=Layout(
            W_enc=Part("encoder.weight", 0),
            W_dec=Part("W_dec", 0),
            b_enc="encoder.bias",
            subtract=None if transcodes else "b_dec",
            b_dec="b_dec",
        ),
    )


def _layer(source: Source, *, transcodes: bool) -> int:
    name = source.folder.name
    if _MODULE.fullmatch(name):
        raise SaeError(
            f"{source.folder}: sparsify names the folder after the module it reads, and {name!r} "
            "is not a block; the residual stream is `layers.L`"
        )
    block = _BLOCK.fullmatch(name)
    found = None
    if block is not None:
        # A transcoder reads what goes into its module: what the block before it gave out.
        found = int(block[1]) - transcodes
        if found < 0:
            raise SaeError(f"{source.folder}: reads the embeddings; take a later block's")
    return stated_layer(source, found, "name the folder as published, `layers.L`")


def _check_sizes(source: Source, d_in: int, d_sae: int) -> None:
    config = source.config
    if config.get("d_in", d_in) != d_in:
        raise wrong(source, f"d_in is {config['d_in']!r}, encoder.weight says {d_in}")
    # 0 latents means: as many as the expansion factor gives.
    claimed = config.get("num_latents") or d_in * config.get("expansion_factor", 32)
    if claimed != d_sae:
        raise wrong(
            source,
            f"num_latents {config.get('num_latents')!r} and expansion_factor "
            f"{config.get('expansion_factor')!r} do not give the {d_sae} latents of encoder.weight",
        )
