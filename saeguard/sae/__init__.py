"""Sparse autoencoders: read checkpoints by slices, encode watched or all latents."""

from saeguard.sae.checkpoint import inspect
from saeguard.sae.encode import Sparse, activate, encode_blocks, encode_full, max_per_text
from saeguard.sae.errors import SaeError
from saeguard.sae.info import SaeInfo, Stated
from saeguard.sae.rows import (
    EncoderRows,
    read_block,
    read_decoder_bias,
    read_decoder_rows,
    read_rows,
    require_rowwise,
)

__all__ = [
    "EncoderRows",
    "SaeError",
    "SaeInfo",
    "Sparse",
    "Stated",
    "activate",
    "encode_blocks",
    "encode_full",
    "inspect",
    "max_per_text",
    "read_block",
    "read_decoder_bias",
    "read_decoder_rows",
    "read_rows",
    "require_rowwise",
]
