"""Read single latents of a checkpoint: a 16-million-latent SAE then costs kilobytes.

Every SAE becomes `pre = x @ W.T + b`, `f = pre * (pre > theta)`. Where the SAE subtracts its
decoder bias from the input, `(x - b_dec) @ W_enc + b_enc`, the bias is folded into `b` once, in
float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from saeguard.sae.checkpoint import SaeError, SaeInfo, opened, require_readable


@dataclass(frozen=True, slots=True)
class EncoderRows:
    """The encoder of some latents, in the order they were asked for."""

    W: torch.Tensor
    """[latents, d_in] float32, contiguous."""
    b: torch.Tensor
    """[latents] float32."""
    theta: torch.Tensor
    """[latents] float32: 0 for ReLU, the threshold for JumpReLU; compared strictly."""


def read_rows(info: SaeInfo, latents: Sequence[int]) -> EncoderRows:
    """Read the encoder rows of `latents`; nothing else of the encoder is loaded.

    Raises:
        SaeError: a latent does not exist, the architecture is not supported, or a value is not
            finite or a threshold negative.
    """
    require_readable(info)
    _check_latents(info, latents)
    spans = [slice(latent, latent + 1) for latent in latents]
    return _read(info, spans, list(latents))


def read_block(info: SaeInfo, start: int, stop: int) -> EncoderRows:
    """Read the encoder rows of the latents `[start, stop)`, in one piece."""
    require_readable(info)
    return _read(info, [slice(start, stop)], list(range(start, stop)))


def read_decoder_rows(info: SaeInfo, latents: Sequence[int]) -> torch.Tensor:
    """Read `W_dec` of `latents`, [latents, d_in] float32.

    Raises:
        SaeError: as `read_rows`.
    """
    require_readable(info)
    _check_latents(info, latents)
    with opened(info.weights) as file:
        W_dec = _pick(file, "W_dec", [slice(latent, latent + 1) for latent in latents])
    _check_finite(info, "W_dec", W_dec, latents)
    return W_dec.float().contiguous()


def _pick(file: Any, name: str, spans: Sequence[slice]) -> torch.Tensor:
    """Read parts of a tensor along its first axis."""
    part = file.get_slice(name)
    return torch.cat([part[span] for span in spans] or [part[0:0]])


def _read(info: SaeInfo, spans: Sequence[slice], latents: list[int]) -> EncoderRows:
    """Read the latents in `spans`, with the decoder bias folded in."""
    with opened(info.weights) as file:
        encoder = file.get_slice("W_enc")  # [d, N], so that a latent is a column
        wide = torch.cat([encoder[:, span] for span in spans] or [encoder[:, 0:0]], 1)
        b = _pick(file, "b_enc", spans).double()
        if info.apply_b_dec_to_input:
            b -= file.get_tensor("b_dec").double() @ wide.double()
        theta = torch.zeros(len(latents))
        if info.architecture == "jumprelu":
            theta = _pick(file, "threshold", spans).float()
    for name, rows in (("W_enc", wide.t()), ("b_enc", b), ("threshold", theta)):
        _check_finite(info, name, rows, latents)
    if (theta < 0).any():
        at = int(torch.nonzero(theta < 0)[0])
        raise SaeError(
            f"{info.weights}: threshold of latent {latents[at]} is {theta[at].item():g}; a "
            "JumpReLU threshold cannot be negative: was the SAE saved before training ended?"
        )
    return EncoderRows(wide.t().float().contiguous(), b.float(), theta)


def _check_latents(info: SaeInfo, latents: Sequence[int]) -> None:
    for latent in latents:
        if not 0 <= latent < info.d_sae:
            raise SaeError(
                f"{info.weights}: there is no latent {latent}; the SAE has {info.d_sae}, "
                f"numbered 0 to {info.d_sae - 1}"
            )


def _check_finite(info: SaeInfo, name: str, rows: torch.Tensor, latents: Sequence[int]) -> None:
    bad = ~torch.isfinite(rows.reshape(len(latents), -1)).all(1) if latents else torch.zeros(0)
    if bad.any():
        at = int(torch.nonzero(bad)[0])
        raise SaeError(
            f"{info.weights}: {name} of latent {latents[at]} is not finite (NaN or infinite); the "
            "checkpoint is damaged, get it again"
        )
