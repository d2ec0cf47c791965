"""The canonical form, computed plainly over all latents: what rows and description amount to."""

from __future__ import annotations

import torch

from saeguard.sae import SaeInfo, encode_full, encode_latents, read_decoder_bias, read_decoder_rows


def encode(info: SaeInfo, x: torch.Tensor) -> torch.Tensor:
    """Return activations [tokens, d_sae] of `x`, computed both ways: all of them, and by latent."""
    found = encode_full(info, x)
    f = torch.zeros(len(x), info.d_sae)
    f[found.token, found.latent] = found.value
    single = encode_latents(info, range(info.d_sae), x)
    assert torch.equal(single != 0, f != 0), "both ways decide alike"
    torch.testing.assert_close(single, f, rtol=1e-4, atol=1e-4)
    return f


def decode(info: SaeInfo, x: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    """Return the reconstruction [tokens, d_in] of `x` from its activations."""
    y = f @ read_decoder_rows(info, range(info.d_sae)) + read_decoder_bias(info)
    if info.norm == "none":
        return y
    mean, _ = moments(info, x)
    spread = x.std(-1, keepdim=True)
    return (
        y * spread + mean
        if info.norm == "layer_norm"
        else y * x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
    )


def moments(info: SaeInfo, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what is subtracted from each token, and what it is multiplied by, [tokens, 1]."""
    zero, one = torch.zeros(len(x), 1), torch.ones(len(x), 1)
    if info.norm == "layer_norm":
        return x.mean(-1, keepdim=True), 1 / (x.std(-1, keepdim=True) + info.eps)
    if info.norm == "constant_norm_rescale":
        return zero, x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True)
    return zero, one
