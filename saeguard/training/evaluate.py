"""Evaluate an SAE: how much of the model's loss its reconstruction preserves.

The model's next-token loss is measured four times on the same texts: as it is, with the residual
after the layer replaced by the SAE's reconstruction, by zeros, and by the reconstruction of a
baseline whose decoder rows are random directions and of which as many latents fire. Tokens that the
SAE never evaluates (special ones, and massive ones) keep their residual throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from saeguard.features.massive import MASSIVE
from saeguard.hf.model import LanguageModel
from saeguard.hf.residuals import batches, on_output, padded
from saeguard.sae import (
    Encoder,
    SaeError,
    SaeInfo,
    encode_full,
    encoder_in_memory,
    read_block,
    read_decoder_bias,
    read_decoder_rows,
)
from saeguard.training.activations import read_residuals

BATCH_TOKENS = 4096
"""Tokens of one forward pass, padding included."""
ROWS = 4096
"""Rows that are reconstructed at once."""
DENSITIES = tuple(range(-6, 1))
"""Edges of the density histogram, powers of ten."""
Replace = Callable[[torch.Tensor], torch.Tensor]
"""Returns the replacement of residuals [rows, d_in]."""
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Autoencoder:
    """Encoder and decoder of a checkpoint, read by saeguard's own reader."""

    encoder: Encoder
    W_dec: torch.Tensor
    """[d_sae, d_in] float32."""
    b_dec: torch.Tensor

    def reconstruct(self, x: torch.Tensor) -> tuple[torch.Tensor, np.ndarray]:
        """Return the reconstruction of `x` [rows, d_in], and which latents fired, [n] int64."""
        found = encode_full(self.encoder, x)
        order = found.token.argsort(stable=True)
        latents, values = found.latent[order], found.value[order]
        counts = torch.bincount(found.token, minlength=len(x))
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)[:-1]])
        y = torch.nn.functional.embedding_bag(
            latents, self.W_dec, offsets, mode="sum", per_sample_weights=values
        )
        return y + self.b_dec, latents.numpy()


@dataclass(frozen=True, slots=True)
class RandomDecoder:
    """A baseline of random unit directions: the `k` that fit a token best, at one common scale."""

    W_dec: torch.Tensor
    """[latents, d_in], unit rows."""
    centre: torch.Tensor
    k: int
    scale: float = 1.0

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        """Return the reconstruction of `x` [rows, d_in]."""
        top = ((x - self.centre) @ self.W_dec.T).topk(self.k, dim=1)
        f = torch.relu(top.values) * self.scale
        y = torch.nn.functional.embedding_bag(
            top.indices, self.W_dec, mode="sum", per_sample_weights=f
        )
        return y + self.centre


def open_autoencoder(info: SaeInfo) -> Autoencoder:
    """Read the whole of a checkpoint.

    Raises:
        SaeError: it cannot be read, normalises each token, or is a transcoder.
    """
    if info.norm != "none":
        raise SaeError(
            f"{info.path}: per-token norm {info.norm!r}; only SAEs without are evaluated"
        )
    rows = read_block(info, 0, info.d_sae)
    encoder = encoder_in_memory(rows, k=info.k, groups=info.activation == "groupmax")
    W_dec = read_decoder_rows(info, range(info.d_sae))
    return Autoencoder(encoder, W_dec, read_decoder_bias(info))


def random_decoder(sae: Autoencoder, x: torch.Tensor, l0: float, seed: int) -> RandomDecoder:
    """Return the baseline for `sae`: as many latents, as many of them firing, fitted to `x`."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(sae.W_dec.shape, generator=draw)
    rows /= rows.norm(dim=1, keepdim=True)
    k = min(max(1, round(l0)), len(rows))
    centre = x.mean(0)
    y = RandomDecoder(rows, centre, k).reconstruct(x) - centre
    scale = float((y * (x - centre)).sum() / y.pow(2).sum().clamp(min=1e-12))
    return RandomDecoder(rows, centre, k, scale)


@dataclass(frozen=True, slots=True)
class Fit:
    """How well an SAE reconstructs residuals, and how often its latents fire."""

    tokens: int
    explained_variance: float
    l0: float
    fired: np.ndarray
    """[d_sae] share of the tokens on which each latent fires."""

    @property
    def dead(self) -> int:
        """Number of latents that fired on none of the tokens."""
        return int((self.fired == 0).sum())

    @property
    def density(self) -> dict[str, int]:
        """Number of latents by how often they fire, in powers of ten."""
        alive = np.log10(self.fired[self.fired > 0])
        counts, _ = np.histogram(np.clip(alive, DENSITIES[0], 0), DENSITIES)
        named = {f"1e{e}": int(n) for e, n in zip(DENSITIES, counts, strict=False)}
        return {"never": self.dead, **named}


def fit(sae: Autoencoder, x: torch.Tensor) -> Fit:
    """Measure how well `x` [tokens, d_in] is reconstructed."""
    fired = np.zeros(sae.encoder.d_sae, np.int64)
    missed = 0.0
    for part in parts(x):
        y, latents = sae.reconstruct(part)
        fired += np.bincount(latents, minlength=sae.encoder.d_sae)
        missed += float((part - y).double().pow(2).sum())
    return Fit(len(x), 1 - missed / total_variance(x), float(fired.sum()) / len(x), fired / len(x))


def parts(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield `x` a few rows at a time."""
    for i in range(0, len(x), ROWS):
        yield x[i : i + ROWS]


def total_variance(x: torch.Tensor) -> float:
    """Return the summed squared distance of `x` from its mean."""
    return float((x - x.mean(0)).double().pow(2).sum())


@dataclass(frozen=True, slots=True)
class Texts:
    """Token ids of texts, and which tokens an SAE evaluates."""

    ids: Sequence[np.ndarray]
    kept: Sequence[np.ndarray]
    """[tokens] bool each."""


def choose_tokens(lm: LanguageModel, ids: Sequence[np.ndarray], norms: torch.Tensor) -> Texts:
    """Leave out special tokens, and those whose norm lies far above the median.

    Args:
        lm: the model.
        ids: of each text.
        norms: [tokens] of the residual, all texts one after the other.
    """
    ordinary = torch.from_numpy(~np.isin(np.concatenate(ids), lm.special_tokens))
    bound = MASSIVE * float(norms[ordinary].median())
    kept = (ordinary & (norms <= bound)).numpy()
    edges = np.cumsum([len(text) for text in ids])[:-1]
    return Texts(ids, np.split(kept, edges))


@torch.no_grad()
def next_token_loss(
    lm: LanguageModel, layer: int, texts: Texts, replace: Replace | None = None
) -> float:
    """Return the mean next-token loss, with the residual of evaluated tokens replaced."""
    total, count = 0.0, 0
    device = next(lm.model.parameters()).device
    for rows in batches([len(text) for text in texts.ids], BATCH_TOKENS):
        ids, mask = padded([texts.ids[i].tolist() for i in rows])
        kept = torch.zeros_like(mask, dtype=torch.bool)
        for row, i in enumerate(rows):
            kept[row, : len(texts.kept[i])] = torch.from_numpy(texts.kept[i])
        logits = _logits(lm, layer, ids.to(device), mask.to(device), kept.to(device), replace)
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().transpose(1, 2), ids[:, 1:].to(device), reduction="none"
        )
        known = mask[:, 1:].bool().to(device)
        total += float(losses[known].double().sum())
        count += int(known.sum())
    return total / count


def _logits(
    lm: LanguageModel,
    layer: int,
    ids: torch.Tensor,
    mask: torch.Tensor,
    kept: torch.Tensor,
    replace: Replace | None,
) -> Any:
    """Run the whole model; `replace` sees the residuals of evaluated tokens only."""

    def change(x: torch.Tensor) -> torch.Tensor:
        if replace is None:
            return x
        y = x.clone()
        y[kept] = replace(x[kept].float().cpu()).to(x)
        return y

    with on_output(lm, layer, change):
        return lm.model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def loss_recovered(clean: float, spliced: float, zero: float) -> float:
    """Return which share of the loss that zeros add the reconstruction avoids; 1 is all of it."""
    return (zero - spliced) / (zero - clean) if zero != clean else float("nan")


def evaluate(
    lm: LanguageModel,
    info: SaeInfo,
    ids: Sequence[np.ndarray],
    *,
    seed: int = 0,
    report: Report = lambda _stage: None,
) -> dict[str, Any]:
    """Return every figure of the evaluation under its name in the card.

    Args:
        lm: the model.
        info: the checkpoint; its layer is read.
        ids: of texts that it was not trained on.
        seed: of the random baseline.
        report: called with the name of the next measurement.
    """
    report("residuals")
    sae = open_autoencoder(info)
    x, _, _ = read_residuals(lm, info.layer, ids)
    texts = choose_tokens(lm, ids, x.norm(dim=1))
    x = x[torch.from_numpy(np.concatenate(texts.kept))]
    report("reconstruction")
    found = fit(sae, x)
    baseline = random_decoder(sae, x, found.l0, seed)
    missed = sum(float((p - baseline.reconstruct(p)).double().pow(2).sum()) for p in parts(x))
    loss: dict[str, float] = {}
    replacements: dict[str, Replace | None] = {
        "model": None,
        "spliced": lambda rows: sae.reconstruct(rows)[0],
        "zero": torch.zeros_like,
        "random_decoder": baseline.reconstruct,
    }
    for name, replace in replacements.items():
        report(f"next-token loss: {name}")
        loss[name] = next_token_loss(lm, info.layer, texts, replace)
    return {
        "texts": len(ids),
        "tokens": found.tokens,
        "tokens_left_out": sum(map(len, ids)) - found.tokens,
        **figures(found),
        "cross_entropy": loss,
        "loss_recovered": loss_recovered(loss["model"], loss["spliced"], loss["zero"]),
        "random_decoder": {
            "l0": baseline.k,
            "explained_variance": 1 - missed / total_variance(x),
            "loss_recovered": loss_recovered(loss["model"], loss["random_decoder"], loss["zero"]),
        },
    }


def figures(found: Fit) -> dict[str, Any]:
    """Return the figures of a reconstruction under their names in the card."""
    return {
        "l0": found.l0,
        "explained_variance": found.explained_variance,
        "dead_latents": found.dead,
        "density": found.density,
    }
