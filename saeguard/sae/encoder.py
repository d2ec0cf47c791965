"""One encoder: a checkpoint that is read by blocks, or tensors in memory.

Every public SAE folds into one formula, which costs the same for all of them and keeps NaN:

    z = scale(x) * (x @ W.T) + b
    f = z * (z > theta)                  then, for `topk` and `groupmax`, only the largest of them

- ReLU has theta 0, JumpReLU its threshold; a linear probe -inf.
- A gated SAE, `(x @ W + b_gate > 0) * relu(exp(r) * (x @ W) + b_mag)`, is a JumpReLU SAE with
  rows `exp(r) * W`, bias `b_mag` and threshold `max(b_mag - exp(r) * b_gate, 0)` (Rajamanoharan
  et al. 2024, arXiv 2404.16014, section 3.2.1 and appendix).
- Layer norm subtracts each token's mean, `(x - mean) @ w = x @ (w - mean(w))`, so rows of which
  their own mean is subtracted need no mean at run time, only the scale `1 / (std + 1e-5)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from saeguard.sae.checkpoint_info import Norm, SaeInfo
from saeguard.sae.errors import SaeError
from saeguard.sae.rows import EncoderRows, read_block, read_rows

NORMS: tuple[Norm, ...] = ("none", "layer_norm", "constant_norm_rescale")
LAYER_NORM_EPS = 1e-5
"""What SAELens and OpenAI's autoencoders add to the standard deviation."""


@dataclass(frozen=True, slots=True)
class Encoder:
    """All latents of one SAE."""

    d_in: int
    d_sae: int
    block: Callable[[int, int], EncoderRows]
    """Rows of the latents `[start, stop)`. `W` may be of a half precision, and need not be
    contiguous."""
    take: Callable[[Sequence[int]], EncoderRows]
    """Rows of single latents."""
    k: int | None = None
    """How many latents fire at most: of all, or one of each of `k` groups; None: as many as
    clear their thresholds."""
    groups: bool = False
    """Whether the largest of each of `k` equal groups fires (`groupmax`), not `k` of all."""
    norm: Norm = "none"
    in_memory: bool = False
    """Whether a block costs nothing to get."""
    longest: tuple[float, float] | None = None
    """`extent` of all encoder rows, if latents compete and it is known."""

    @property
    def group(self) -> int:
        """Number of latents that compete with each other: all of them, or those of one group."""
        return self.d_sae // self.k if self.groups and self.k else self.d_sae


def open_encoder(source: SaeInfo | Encoder) -> Encoder:
    """Return the encoder of a checkpoint; an encoder is returned as it is."""
    if isinstance(source, Encoder):
        return source
    info = source
    if info.norm == "layer_norm" and info.eps != LAYER_NORM_EPS:
        raise SaeError(
            f"{info.path}: layer norm with eps {info.eps:g}; only {LAYER_NORM_EPS:g} is supported"
        )
    return Encoder(
        d_in=info.d_in,
        d_sae=info.d_sae,
        block=lambda start, stop: read_block(info, start, stop),
        take=lambda latents: read_rows(info, latents),
        k=info.k,
        groups=info.activation == "groupmax",
        norm=info.norm,
    )


def encoder_in_memory(
    rows: EncoderRows, *, k: int | None = None, groups: bool = False, norm: Norm = "none"
) -> Encoder:
    """Return an encoder over encoder rows in memory.

    Args:
        rows: of all latents, in order; for `layer_norm` rows of mean 0. `W` is
            [d_sae, d_in] in float32, bfloat16 or float16, and may be the view `W_enc.t()`.
        k: for TopK.
        groups: the `k` latents are the largest of `k` equal groups.
        norm: the normalisation of each token.

    Raises:
        ValueError: `k` is out of range or does not divide the latents into groups.
    """
    d_sae, d_in = rows.W.shape
    if k is not None and not 0 < k <= d_sae:
        raise ValueError(f"k is {k}; it must lie in 1 to {d_sae}, the number of latents")
    if groups and (k is None or d_sae % k):
        raise ValueError(f"groupmax: {d_sae} latents cannot be split into k = {k} equal groups")

    def block(start: int, stop: int) -> EncoderRows:
        return EncoderRows(rows.W[start:stop], rows.b[start:stop], rows.theta[start:stop])

    def take(latents: Sequence[int]) -> EncoderRows:
        at = torch.as_tensor(latents, device=rows.b.device)
        return EncoderRows(rows.W[at], rows.b[at], rows.theta[at])

    longest = None
    if k is not None:
        parts = [extent(block(i, i + 8192)) for i in range(0, d_sae, 8192)]
        longest = max(w for w, _ in parts), max(b for _, b in parts)
    return Encoder(d_in, d_sae, block, take, k, groups, norm, in_memory=True, longest=longest)


def extent(rows: EncoderRows) -> tuple[float, float]:
    """Return the largest norm of a row of `W`, and the largest `|b|`."""
    length = torch.linalg.vector_norm(rows.W.float(), dim=1).max()
    return float(length), float(rows.b.abs().max())


def token_scale(norm: Norm, x: torch.Tensor) -> torch.Tensor | None:
    """Return the factor of each token's products, [tokens, 1]; None if all factors are 1.

    `layer_norm` is `1 / (std + 1e-5)` with the unbiased deviation, `constant_norm_rescale`
    `sqrt(d_in) / |x|`, both as SAELens computes them.
    """
    if norm == "layer_norm":
        return 1.0 / (x.std(1, keepdim=True) + LAYER_NORM_EPS)
    if norm == "constant_norm_rescale":
        length: torch.Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        return float(x.shape[1] ** 0.5) / length
    return None


def column_scales(norm: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """Return the factor of each product of `x` [tokens, d_in], [tokens, columns].

    Args:
        norm: [columns] int64, indices into `NORMS`; None if no scale is needed, which gives None.
        x: float32.
    """
    if norm is None:
        return None
    kinds = [token_scale(kind, x) for kind in NORMS]
    one = x.new_ones(len(x), 1)
    scales: torch.Tensor = torch.cat([one if k is None else k for k in kinds], 1)[:, norm]
    return scales


def product(
    rows: EncoderRows,
    x: torch.Tensor,
    scale: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return pre-activations [tokens, latents] float32 of `x` [tokens, d_in] float32.

    Args:
        rows: of the latents.
        x: the tokens.
        scale: [tokens, 1] or [tokens, latents]; None for 1.
        out: [tokens, latents] float32 that may be overwritten; the result need not be in it.
    """
    W = rows.W.float()
    if scale is None and _ONEDNN is not None and _fit(W, x):
        return _ONEDNN(x, W, rows.b, "none", [], "")
    # Not `addmm`, which at 512 tokens takes a tenth longer.
    z = torch.mm(x, W.t(), out=out)
    if scale is not None:
        z.mul_(scale)
    return z.add_(rows.b)


def worth_a_copy(W: torch.Tensor, tokens: int) -> bool:
    """Return whether it pays to copy encoder rows that lie transposed in a wider matrix.

    oneDNN takes hundreds of times longer for such rows; torch.mm does not.
    """
    return _ONEDNN is not None and not _INTEL and tokens >= MANY and not W.is_contiguous()


def _fit(W: torch.Tensor, x: torch.Tensor) -> bool:
    """Return whether oneDNN computes `x @ W.T`, without a gradient, faster than torch.mm.

    torch.mm is MKL's on a CPU. oneDNN's product, which torch.compile uses, takes 0.5 to 0.9 of its
    time on AMD, but more for one token under a transposed `W`. On Intel it takes 0.4 to 0.9 of it
    for some tokens, more for one or for many (benchmarks/encode.py).
    """
    if x.device.type != "cpu" or torch.is_grad_enabled() or (_INTEL and not FEW <= len(x) < MANY):
        return False
    return W.is_contiguous() or (len(x) > 1 and W.t().is_contiguous())


def _intel() -> bool:
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and "GenuineIntel" in cpu.read_text()


FEW = 4
"""Tokens from which on several at once pay on Intel, and sorting all latents of each does not."""
MANY = 256
"""Tokens that are too many for oneDNN on Intel, and enough for a copy of the weights elsewhere."""
_INTEL = _intel()
_ONEDNN: Callable[..., torch.Tensor] | None = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    else None
)
