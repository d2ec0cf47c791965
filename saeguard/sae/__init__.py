"""Sparse autoencoders: read checkpoints by slices, encode watched or all latents."""

from saeguard.sae.checkpoint import SaeError, SaeInfo, inspect
from saeguard.sae.encode import Sparse, activate, encode_blocks, encode_full, max_per_text
from saeguard.sae.rows import EncoderRows, read_decoder_rows, read_rows

__all__ = [
    "EncoderRows",
    "SaeError",
    "SaeInfo",
    "Sparse",
    "activate",
    "encode_blocks",
    "encode_full",
    "inspect",
    "max_per_text",
    "read_decoder_rows",
    "read_rows",
]
