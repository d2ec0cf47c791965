"""Child of test_kernels.py: the full-width kernel in Triton's interpreter beside `encode_full`."""

from __future__ import annotations

import itertools

import torch

from saeguard.sae import EncoderRows, encode_full, encoder_in_memory
from saeguard.sae.encoder import token_scale
from saeguard.sae.wide import encode_into


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


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"wide {check()}")
