"""Fit thresholds that replace ranks: a TopK latent read as a JumpReLU one, and how well it agrees.

By rank, a latent fires if fewer than `k` others lie above it, and finding out takes the whole
encoder. A threshold of its own pre-activation takes its own row only, and is sometimes wrong. The
threshold is fitted on some texts, by the F1 of "above it" against "fires by rank": a plain count of
errors would be least, for a rare latent, where it never fires. What the agreement is worth is
measured on other texts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from saeguard.features.corpus import Corpus, join
from saeguard.features.stats import interval
from saeguard.features.topk_thresholds import Approximation, Rate, StandIn
from saeguard.features.types import FeatureSet
from saeguard.sae import SaeError, SaeInfo, open_encoder
from saeguard.sae.encoder import product, token_scale
from saeguard.sae.topk_watched import drop, read_competitors

LEAST = 10
"""Tokens on which a latent must fire by rank, to fit on and again to measure on."""
ROWS = 4096
"""Tokens ranked at once."""


def approximate(
    features: FeatureSet, info: SaeInfo, fit: Sequence[Corpus], check: Sequence[Corpus] = ()
) -> Approximation:
    """Fit a threshold for the rank of each latent that a feature set names, and measure it.

    Args:
        features: the set; its probes need none.
        info: its SAE, as it ranks.
        fit: texts to fit on; special tokens are left out.
        check: other texts to measure on. Without any, every other text of `fit` is kept for it.

    Raises:
        SaeError: the SAE does not rank, or a latent fires too rarely to measure.
    """
    if info.k is None:
        raise SaeError(
            f"{info.path}: --topk approximate is for SAEs whose latents fire by rank (topk, "
            f"groupmax), this one is {info.activation} and is read exactly"
        )
    latents = sorted({t.latent for f in features.features.values() for t in (*f.detect, *f.clamp)})
    if not latents:
        raise SaeError(f"{features.path}: no feature names a latent: there are no ranks")
    texts = _joined(fit)
    if check:
        held = _joined(check)
    else:
        even = np.arange(len(texts)) % 2 == 0
        texts, held = texts.select(even), texts.select(~even)
    z, fires = by_rank(info, latents, _looked(texts, info.layer))
    floor = open_encoder(info).take(latents).theta.tolist()  # a ReLU's 0 holds as well
    thresholds = [
        max(fitted(info, latent, z[:, i], fires[:, i]), floor[i])
        for i, latent in enumerate(latents)
    ]
    x = _looked(held, info.layer)
    z, fires = by_rank(info, latents, x)
    return Approximation(
        k=info.k,
        sha256=info.sha256,
        texts_sha256=hashlib.sha256(held.tokens.astype("<i8").tobytes()).hexdigest(),
        texts=len(held),
        tokens=len(x),
        latents={
            latent: measured(info, latent, threshold, z[:, i], fires[:, i])
            for i, (latent, threshold) in enumerate(zip(latents, thresholds, strict=True))
        },
    )


def by_rank(
    info: SaeInfo, latents: Sequence[int], x: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Return pre-activations, and a mask of the latents that fire by rank; both [tokens, latents].

    Raises:
        SaeError: the weights are damaged.
    """
    encoder = open_encoder(info)
    rows, competitors = encoder.take(latents), read_competitors(encoder, latents)
    pre, fires = [], []
    for chunk in torch.split(x, ROWS):
        z = product(rows, chunk, token_scale(encoder.norm, chunk))
        f = z * (z > rows.theta)
        drop(competitors, chunk, f)
        pre.append(z)
        fires.append(f != 0)
    return torch.cat(pre).numpy(), torch.cat(fires).numpy()


def fitted(info: SaeInfo, latent: int, z: np.ndarray, fires: np.ndarray) -> float:
    """Return the threshold of `z` [tokens] of the highest F1, the lowest of equal ones.

    Raises:
        SaeError: the latent fires on too few tokens.
    """
    _enough(info, latent, int(fires.sum()), len(z))
    order = np.argsort(-z, kind="stable")
    sorted_z, hits = z[order], np.cumsum(fires[order])
    f1 = 2 * hits / (np.arange(1, len(z) + 1) + hits[-1])
    f1[:-1][sorted_z[:-1] == sorted_z[1:]] = -1  # equal values are on one side
    last = len(f1) - 1 - int(f1[::-1].argmax())
    lowest = float(sorted_z[last])
    if last + 1 == len(z):
        return float(np.nextafter(np.float32(lowest), np.float32(-np.inf)))
    below = float(sorted_z[last + 1])
    middle = float(np.float32((lowest + below) / 2))
    return middle if middle < lowest else below  # neighbours: nothing lies between


def measured(
    info: SaeInfo, latent: int, threshold: float, z: np.ndarray, fires: np.ndarray
) -> StandIn:
    """Return how well `z > threshold` agrees with `fires`, both [tokens].

    Raises:
        SaeError: the latent fires on too few tokens, or nothing is above its threshold.
    """
    above = z > np.float32(threshold)
    _enough(info, latent, int(fires.sum()), len(z))
    if not above.any():
        raise SaeError(
            f"{info.path}: latent {latent} fires by rank on {fires.sum()} of the tokens to measure "
            f"on, and on none of them is above {threshold:g}, its threshold on the others: the "
            "texts are too different; give more, or rank exactly"
        )
    both = int((above & fires).sum())
    return StandIn(threshold, _rate(both, int(above.sum())), _rate(both, int(fires.sum())))


def _enough(info: SaeInfo, latent: int, fired: int, tokens: int) -> None:
    if fired < LEAST:
        raise SaeError(
            f"{info.path}: latent {latent} fires by rank on {fired} of {tokens} tokens; a "
            f"threshold for its rank takes {LEAST} to fit on and {LEAST} others to measure on. "
            "Give texts on which it fires (--labelled), or rank exactly (--topk exact)"
        )


def _rate(hits: int, tokens: int) -> Rate:
    low, high = interval(hits, tokens)
    return Rate(round(hits / tokens, 4), (round(low, 4), round(high, 4)), hits, tokens)


def _joined(parts: Sequence[Corpus]) -> Corpus:
    out = parts[0]
    for part in parts[1:]:
        out = join(out, part)
    return out.scoped("both")


def _looked(corpus: Corpus, layer: int) -> torch.Tensor:
    return corpus.at(layer)[torch.from_numpy(corpus.looked)].float()
