"""Sparse autoencoders: read checkpoints in slices, and encode some latents or all."""

from saeguard.sae.checkpoint import inspect
from saeguard.sae.checkpoint_info import SaeInfo, Stated
from saeguard.sae.encode import (
    activate,
    encode_blocks,
    encode_full,
    max_per_text,
    what_fired,
)
from saeguard.sae.encoder import Encoder, encoder_in_memory, open_encoder
from saeguard.sae.errors import SaeError
from saeguard.sae.rows import (
    EncoderRows,
    read_block,
    read_decoder_bias,
    read_decoder_rows,
    read_rows,
)
from saeguard.sae.sparse import Sparse
from saeguard.sae.topk_watched import encode_latents

__all__ = [
    "Encoder",
    "EncoderRows",
    "SaeError",
    "SaeInfo",
    "Sparse",
    "Stated",
    "activate",
    "encode_blocks",
    "encode_full",
    "encode_latents",
    "encoder_in_memory",
    "inspect",
    "max_per_text",
    "open_encoder",
    "read_block",
    "read_decoder_bias",
    "read_decoder_rows",
    "read_rows",
    "what_fired",
]
