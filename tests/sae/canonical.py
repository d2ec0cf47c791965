"""The canonical form, computed plainly over all latents: what rows and description amount to."""

from __future__ import annotations

import torch

from saeguard.sae import SaeInfo, read_decoder_bias, read_decoder_rows, read_rows


def encode(info: SaeInfo, x: torch.Tensor) -> torch.Tensor:
    """Return activations [tokens, d_sae] of `x` by the formula in `saeguard.sae.info`."""
    rows = read_rows(info, range(info.d_sae))
    mean, inv = moments(info, x)
    z = (x @ rows.W.T - mean * rows.colsum) * inv + rows.b
    f = (z > rows.theta) * (rows.scale * z + rows.shift)
    if info.activation == "topk":
        assert info.k is not None
        kept = torch.zeros_like(z).scatter(-1, z.topk(info.k, -1).indices, 1.0)
        return kept * (f if info.relu_after_topk else z)
    if info.activation == "groupmax":
        assert info.k is not None
        groups = z.unflatten(-1, (info.k, -1))
        best = torch.zeros_like(groups).scatter(-1, groups.argmax(-1, keepdim=True), 1.0)
        return f * best.flatten(-2)
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
