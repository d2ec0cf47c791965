"""Describe a checkpoint of any family in the same terms.

Every SAE becomes, for the latents that are asked for,

    z = scale(x) * (x @ W.T) + b
    f = z * (z > theta)

with everything that is the same for every token folded into the rows when they are read. What is
left to do per token is said by `SaeInfo.norm`, and by `SaeInfo.k` where a latent's activation
depends on its rank among the others. `saeguard.sae.encoder` says why gated SAEs and layer norm
fit in.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, TypeAlias

from saeguard.atomic_files import write_atomically
from saeguard.file_marks import marks
from saeguard.real_path import real_path
from saeguard.sae.errors import SaeError

LARGE = 256 << 20
"""Bytes from which a file's digest is remembered across processes."""

Activation: TypeAlias = Literal["relu", "jumprelu", "gated", "topk", "groupmax"]
Norm: TypeAlias = Literal["none", "layer_norm", "constant_norm_rescale"]
Convention: TypeAlias = Literal["openmoss", "saelens"]


@dataclass(frozen=True, slots=True)
class Stated:
    """Facts that the user states about a checkpoint whose files lack them; a file always wins."""

    layer: int | None = None
    """`resid_post` of this block."""
    k: int | None = None
    """Latents that TopK keeps."""
    norm_factor: float | None = None
    """Factor of `expected_average_only_in`: sqrt(d_in) / mean norm of the residual."""
    convention: Convention | None = None
    """Reading of Llama Scope; see docs/sae-formats.md."""


@dataclass(frozen=True, slots=True)
class Part:
    """A stored matrix: its name and the axis that counts latents."""

    name: str
    axis: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the canonical tensors lie in the file, and the constants folded into them.

    With stored W_enc, b_enc, theta, W_dec and b_dec, p the tensor `subtract`, and n the norms of
    the stored decoder rows where `decoder_norm` is set, otherwise 1:

        W      = W_enc * W_enc_factor * n
        b      = (b_enc * b_enc_factor - W_enc @ p) * n
        theta  = threshold * threshold_factor     (of exp(threshold) if `log_threshold`),
                 times n if the norm comes after the threshold
        W_dec' = W_dec / n * W_dec_factor
        b_dec' = b_dec * b_dec_factor
    """

    W_enc: Part
    W_dec: Part
    b_enc: str | None = None
    """[N] added to the product; the gate's bias of a gated SAE. None: zero."""
    subtract: str | None = None
    """[d_in] subtracted from the normalised input."""
    b_dec: str | None = None
    """[d_in] added to the reconstruction. None: zero."""
    threshold: str | float | None = None
    """[N], or one for all; None is 0, as for ReLU."""
    log_threshold: bool = False
    r_mag: str | None = None
    """[N], gated only: log of the magnitude path's scale."""
    b_mag: str | None = None
    """[N], gated only."""
    centred: bool = False
    """Whether the SAE reads the residual without its mean over the token's coordinates, as in a
    model whose writing weights are centred. Then the mean of each row of W is subtracted from it,
    after b."""
    decoder_norm: Literal["none", "before_threshold", "after_threshold"] = "none"
    """Whether activations are in units of the decoder rows' norms, and what the threshold sees."""
    W_enc_factor: float = 1.0
    b_enc_factor: float = 1.0
    threshold_factor: float = 1.0
    W_dec_factor: float = 1.0
    b_dec_factor: float = 1.0


@dataclass(frozen=True, slots=True)
class SaeInfo:
    """The description of one checkpoint, from its headers and its configuration."""

    path: Path
    """Folder of the checkpoint, absolute."""
    weights: Path
    """The weight file in it."""
    config: Path | None
    """The configuration beside it, if the format has one."""
    format: str
    """The family, a key of `formats.FAMILIES`, such as `saelens` or `gemma_scope`."""
    architecture: str
    """As the family names it, such as `jumprelu` or `batch_top_k`."""
    layer: int
    """The SAE reads `resid_post` of this block."""
    d_in: int
    d_sae: int
    dtype: str
    """Of the stored encoder, as safetensors names it, such as `F32`."""
    activation: Activation
    k: int | None
    """topk: latents that stay, of all; groupmax: groups of `d_sae / k` neighbours, of each of
    which the largest stays. None if latents do not compete."""
    relu_after_topk: bool
    """Whether a kept latent below zero becomes zero. False only if the format keeps it."""
    norm: Norm
    """layer_norm: (x - mean) / (std + eps), std with d_in - 1; constant_norm_rescale:
    x * sqrt(d_in) / |x|. Both over one token's residual."""
    eps: float
    """Of layer_norm."""
    transcoder: bool
    """A transcoder does not write where it reads: its latents can be watched, not clamped."""
    model: str | None
    """The model that the checkpoint names; only shown, never checked."""
    folded: tuple[str, ...]
    """What is folded into the encoder rows, in words."""
    layout: Layout
    stand_ins: tuple[tuple[int, float], ...] = ()
    """By latent, a measured threshold that replaces its rank (`thresholds_for_ranks`): an
    approximation. Empty: the SAE as its authors meant it."""

    @property
    def sha256(self) -> str:
        """Digest of the weight file; read once and remembered while the file is unchanged."""
        return file_sha256(self.weights)

    @property
    def config_sha256(self) -> str | None:
        """Digest of the configuration, if there is one."""
        return None if self.config is None else file_sha256(self.config)


def thresholds_for_ranks(info: SaeInfo, k: int, stand_ins: Mapping[int, float]) -> SaeInfo:
    """Return a TopK or groupmax SAE in which some latents fire by a threshold, not by rank.

    What is returned is an approximation: `f = z * (z > threshold)`, for these latents only.

    Args:
        info: the SAE as it is.
        k: what the thresholds were measured under.
        stand_ins: by latent, its threshold.

    Raises:
        SaeError: the SAE's latents do not fire by rank, or `k` is another.
    """
    if info.k is None:
        raise SaeError(
            f"{info.path}: `topk: approximate` is for SAEs whose latents fire by rank (topk, "
            f"groupmax), this one is {info.activation}; remove `topk` and `topk_measured`"
        )
    if info.k != k:
        raise SaeError(
            f"{info.path}: k is {info.k}, but the thresholds that stand for ranks were measured "
            f"under k = {k}; measure them again with `saeguard features calibrate --topk "
            "approximate`"
        )
    kept = tuple(sorted(stand_ins.items()))
    return replace(info, activation="jumprelu", k=None, stand_ins=kept)


def file_sha256(file: Path) -> str:
    """Return the sha256 of `file`, remembered while its size and times of change stay.

    Of large files it is remembered across processes, in the user's cache: hashing a checkpoint of
    100 GB takes minutes, and every start would wait for it.
    """
    stat = file.stat()
    key = " ".join(map(str, (stat.st_dev, *marks(stat))))
    return _digest(file, key, stat.st_size >= LARGE)


@lru_cache(maxsize=64)
def _digest(file: Path, key: str, large: bool) -> str:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saeguard/digests"
    note = cache / hashlib.sha256(os.fsencode(real_path(file))).hexdigest()
    if large and note.is_file():
        found, _, digest = note.read_text().rpartition(" ")
        if found == key:
            return digest
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if large:
        with suppress(OSError):  # a read-only home only costs the time again
            write_atomically(note, f"{key} {digest}")
    return digest
