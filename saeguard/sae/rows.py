"""Read single latents of a checkpoint, so that an SAE of 16 million latents costs megabytes.

`sae.checkpoint_info` documents the formula that all SAEs share, and what is folded into it. Folds
are computed in float64 and rounded to float32 once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from saeguard.sae.checkpoint_info import Part, SaeInfo
from saeguard.sae.errors import SaeError
from saeguard.sae.tensors import TensorFile
from saeguard.sae.weights import read_headers


@dataclass(frozen=True, slots=True)
class EncoderRows:
    """The encoder of some latents, in the order they were asked for.

    `z = scale(x) * (x @ W.T) + b`, `f = z * (z > theta)`: see `saeguard.sae.encoder`.
    """

    W: torch.Tensor
    """[latents, d_in] float32, contiguous."""
    b: torch.Tensor
    """[latents] float32."""
    theta: torch.Tensor
    """[latents] float32, compared strictly: 0 for ReLU and TopK, the threshold for JumpReLU and,
    in units of the magnitude, for gated SAEs."""

    def to(self, device: torch.device | None) -> EncoderRows:
        """Return the same rows on a device; themselves if they are there already."""
        return EncoderRows(self.W.to(device), self.b.to(device), self.theta.to(device))


def read_rows(info: SaeInfo, latents: Sequence[int]) -> EncoderRows:
    """Read the encoder rows of `latents`; nothing else of the encoder is loaded.

    Raises:
        SaeError: a latent does not exist, or a value is not finite or a threshold negative.
    """
    _check_latents(info, latents)
    return _read(info, latents)


def read_block(info: SaeInfo, start: int, stop: int) -> EncoderRows:
    """Read the encoder rows of the latents `[start, stop)`, as `read_rows`."""
    return read_rows(info, range(start, stop))


def read_decoder_rows(info: SaeInfo, latents: Sequence[int]) -> torch.Tensor:
    """Read `W_dec` of `latents`, [latents, d_in] float32: what one unit of each adds to `x`.

    Of an SAE that normalises per token it is what a unit adds to `norm(x)`.

    Raises:
        SaeError: as `read_rows`, or the SAE is a transcoder, whose decoder writes to another place.
    """
    if info.transcoder:
        raise SaeError(
            f"{info.path}: a transcoder: its decoder does not write where the encoder reads, so "
            "its latents can be watched but not clamped"
        )
    _check_latents(info, latents)
    layout = info.layout
    stored = _matrix(info, read_headers(info.weights), layout.W_dec, latents).double()
    if layout.decoder_norm != "none":
        stored /= _norms(info, stored, latents)[:, None]
    return (stored * layout.W_dec_factor).float()


def read_decoder_bias(info: SaeInfo) -> torch.Tensor:
    """Read what the decoder adds to `f @ W_dec`, [d_in] float32."""
    name = info.layout.b_dec
    if name is None or info.transcoder:
        return torch.zeros(info.d_in)
    bias = _vector(info, read_headers(info.weights), name)
    return (bias * info.layout.b_dec_factor).float()


def _read(info: SaeInfo, latents: Sequence[int]) -> EncoderRows:
    layout, file = info.layout, read_headers(info.weights)
    W = _matrix(info, file, layout.W_enc, latents).double()
    b = torch.zeros(len(latents), dtype=torch.float64)
    if layout.b_enc is not None:
        b = _of_latents(info, file, layout.b_enc, latents)
    scale, shift = torch.ones_like(b), torch.zeros_like(b)
    if layout.r_mag is not None and layout.b_mag is not None:
        scale = _of_latents(info, file, layout.r_mag, latents).exp()
        _check_finite(info, f"exp({layout.r_mag})", scale.float(), latents)
        shift = _of_latents(info, file, layout.b_mag, latents) - scale * b
    b = b * layout.b_enc_factor
    if layout.subtract is not None:
        b = b - W @ _vector(info, file, layout.subtract)
    W = W * layout.W_enc_factor
    theta = _thresholds(info, file, latents)
    if layout.decoder_norm != "none":
        norms = _norms(info, _matrix(info, file, layout.W_dec, latents).double(), latents)
        W, b, shift = W * norms[:, None], b * norms, shift * norms
        if layout.decoder_norm == "after_threshold":
            theta = theta * norms
    # A gate is a threshold of the magnitude, since both are functions of one product.
    theta = scale * torch.maximum(theta, -shift / scale) + shift
    if not info.relu_after_topk:
        theta = torch.full_like(theta, -torch.inf)
    if info.stand_ins:
        theta = torch.maximum(theta, _stand_ins(info, latents))
    W, b = W * scale[:, None], b * scale + shift
    if layout.centred or info.norm == "layer_norm":  # stands for subtracting each token's mean
        W = W - W.mean(1, keepdim=True)
    return EncoderRows(W=W.float(), b=b.float(), theta=theta.float())


def _thresholds(info: SaeInfo, file: TensorFile, latents: Sequence[int]) -> torch.Tensor:
    layout = info.layout
    if layout.threshold is None:
        return torch.zeros(len(latents), dtype=torch.float64)
    if isinstance(layout.threshold, str):
        theta = _of_latents(info, file, layout.threshold, latents)
    else:
        theta = torch.full((len(latents),), layout.threshold, dtype=torch.float64)
    theta = (theta.exp() if layout.log_threshold else theta) * layout.threshold_factor
    if (theta < 0).any():
        at = int(torch.nonzero(theta < 0)[0])
        raise SaeError(
            f"{info.weights}: threshold of latent {latents[at]} is {theta[at].item():g}; a "
            "JumpReLU threshold cannot be negative: was the SAE saved before training ended?"
        )
    return theta


def _stand_ins(info: SaeInfo, latents: Sequence[int]) -> torch.Tensor:
    measured = dict(info.stand_ins)
    missing = [latent for latent in latents if latent not in measured]
    if missing:
        raise SaeError(
            f"{info.path}: no threshold was measured that stands for the rank of latent "
            f"{missing[0]}; measure with `saeguard features calibrate --topk approximate`, or rank "
            "exactly with `--topk exact`"
        )
    return torch.tensor([measured[latent] for latent in latents], dtype=torch.float64)


def _matrix(info: SaeInfo, file: TensorFile, part: Part, latents: Sequence[int]) -> torch.Tensor:
    rows = file.take(part.name, latents, part.axis)
    _check_finite(info, part.name, rows, latents)
    return rows


def _of_latents(info: SaeInfo, file: TensorFile, name: str, latents: Sequence[int]) -> torch.Tensor:
    """Return a vector's entries at `latents`, float64."""
    entries = file.take(name, latents)
    _check_finite(info, name, entries, latents)
    return entries.double()


def _vector(info: SaeInfo, file: TensorFile, name: str) -> torch.Tensor:
    """Return a whole vector, float64."""
    vector = file.all(name)
    if not torch.isfinite(vector).all():
        raise _not_finite(info, name)
    return vector.double()


def _norms(info: SaeInfo, W_dec: torch.Tensor, latents: Sequence[int]) -> torch.Tensor:
    norms: torch.Tensor = W_dec.norm(dim=1)
    if not norms.all():
        at = int(torch.nonzero(norms == 0)[0])
        raise SaeError(
            f"{info.weights}: {info.layout.W_dec.name} of latent {latents[at]} is zero, and its "
            "activations are in units of that norm; the latent is dead, watch another"
        )
    return norms


def _check_latents(info: SaeInfo, latents: Sequence[int]) -> None:
    for latent in latents:
        if not 0 <= latent < info.d_sae:
            raise SaeError(
                f"{info.weights}: there is no latent {latent}; the SAE has {info.d_sae}, "
                f"numbered 0 to {info.d_sae - 1}"
            )


def _check_finite(info: SaeInfo, name: str, rows: torch.Tensor, latents: Sequence[int]) -> None:
    finite = torch.isfinite(rows).reshape(len(latents), -1).all(1) if len(latents) else None
    if finite is not None and not finite.all():
        raise _not_finite(info, name, latents[int(torch.nonzero(~finite)[0])])


def _not_finite(info: SaeInfo, name: str, latent: int | None = None) -> SaeError:
    which = name if latent is None else f"{name} of latent {latent}"
    return SaeError(
        f"{info.weights}: {which} is not finite (NaN or infinite); the checkpoint is damaged, get "
        "it again"
    )
