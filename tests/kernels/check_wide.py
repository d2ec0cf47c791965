"""Child of test_kernels.py: the full-width kernel in Triton's interpreter beside `encode_full`."""

from __future__ import annotations

import itertools

import torch

from saeguard.sae import EncoderRows, encode_full, encode_triton, encoder_in_memory
from saeguard.sae.encode_triton import encode_into, encode_on_gpu
from saeguard.sae.encoder import token_scale
from tests.kernels.check_rank import rows_with_ties


def check() -> int:
    """Compare over shapes, dtypes, norms and buffers that are too small."""
    checked = 0
    shapes = [(1, 10, 8), (70, 130, 33), (64, 64, 64)]
    norms = ("none", "constant_norm_rescale")
    dtypes = (torch.float32, torch.bfloat16)
    for (tokens, latents, d_in), dtype, norm in itertools.product(shapes, dtypes, norms):
        x, W = torch.randn(tokens, d_in).to(dtype), torch.randn(latents, d_in).to(dtype)
        b, theta = torch.randn(latents), torch.rand(latents)
        encoder = encoder_in_memory(EncoderRows(W, b, theta), norm=norm)
        found = encode_full(encoder, x)
        expected = torch.zeros(tokens, latents)
        expected[found.token, found.latent] = found.value
        scale = token_scale(norm, x.float())
        for capacity in (tokens * latents, 5):
            token, latent = (torch.full((capacity,), -1, dtype=torch.int32) for _ in range(2))
            value, count = torch.zeros(capacity), torch.zeros((), dtype=torch.int32)
            encode_into(
                x, W, b, theta, token, latent, value, count,
                None if scale is None else scale[:, 0],
            )  # fmt: skip
            assert int(count) == len(found), "counted whether or not it fits"
            kept = min(capacity, int(count))
            at = token[:kept].long(), latent[:kept].long()
            assert len(set(zip(*(t.tolist() for t in at), strict=True))) == kept, "each once"
            torch.testing.assert_close(value[:kept], expected[at], rtol=1e-4, atol=1e-4)
            assert (token[kept:] == -1).all()
            checked += 1
    x[0, 0] = torch.nan
    encode_into(x, W, b, theta, token, latent, value.zero_(), count.zero_())
    assert value.isnan().any(), "NaN is seen"
    return checked


def check_whole() -> int:
    """Compare whole encodes, block by block and with too little room at first, with `encode_full`.

    Both decide what TopK keeps as exact arithmetic would, so they must agree latent by latent.
    """
    checked = 0
    encode_triton.FIRED, encode_triton.OPENING = 3, 60
    norms = ("none", "layer_norm", "constant_norm_rescale")
    for norm, k, tokens in itertools.product(norms, (None, 1, 12, 70), (1, 70)):
        rows = rows_with_ties(140, 33)
        encoder = encoder_in_memory(rows, k=k, norm=norm)
        x = torch.randn(tokens, 33).bfloat16()
        ours, expected = (
            torch.zeros(tokens, 140).index_put((found.token, found.latent), found.value)
            for found in (encode_on_gpu(encoder, x, block=64), encode_full(encoder, x))
        )
        assert expected.any()
        if k is not None:
            assert torch.equal(ours != 0, expected != 0), (norm, k, tokens)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
        checked += 1
    return checked


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"wide {check()} whole {check_whole()}")
