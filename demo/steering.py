"""Choose the latents that a clamp raises: what detects need not steer, so effects are measured.

Everything here sees the search split only. Candidates fire on the secure twins and not on the
insecure ones; they are raised to about the height they have there, and what counts is by how much
the model then prefers the secure twin, as long as the secure twin itself stays as likely.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from demo.effect import contrast, output_logprob, setting
from saeguard.features.corpus import Corpus
from saeguard.features.stats import auroc
from saeguard.hf.model import LanguageModel
from saeguard.hf.texts import Text
from saeguard.sae import SaeInfo, max_per_text, read_decoder_rows, read_rows

CANDIDATES, LATENTS, TEXTS, CONTROLS = 24, 2, 100, 20
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5)
DEARER = 0.05
"""By how much the loss on the secure twins may grow, as a share."""
ALIVE = 0.02


@dataclass(frozen=True)
class Steering:
    """Latents and the values that a clamp sets them to."""

    target: dict[int, float]
    evidence: dict[str, Any]


def choose_steering(
    lm: LanguageModel,
    info: SaeInfo,
    corpus: Corpus,
    texts: Sequence[Text],
    ordinary: Sequence[Text],
    seed: int,
) -> Steering:
    """Return the latents that turn insecure code into its secure twin when raised.

    Args:
        lm: the model.
        info: its SAE.
        corpus: residuals of the labelled search texts.
        texts: the same texts.
        ordinary: dialogues whose likelihood should not suffer.
        seed: for the controls.
    """
    peaks = max_per_text(info, corpus.x, corpus.lengths)
    secure = ~corpus.label
    fires = (peaks[secure] > 0).sum(0)
    height = peaks[secure].sum(0) / np.maximum(fires, 1)
    alive = np.flatnonzero((peaks > 0).mean(0) > ALIVE)
    candidates = alive[np.argsort(-auroc(peaks[:, alive], secure), kind="stable")[:CANDIDATES]]
    texts = list(texts)[:TEXTS]
    label = np.array([bool(t.label) for t in texts])
    plain = output_logprob(lm, texts, info.layer)

    def edit(target: dict[int, float]) -> Any:
        latents = list(target)
        rows, W_dec = read_rows(info, latents), read_decoder_rows(info, latents)
        return setting(rows, W_dec, torch.tensor(list(target.values())))

    def effect(target: dict[int, float]) -> tuple[float, float]:
        """By how much the insecure twin loses, and how much dearer the secure one gets."""
        changed = output_logprob(lm, texts, info.layer, edit(target))
        secure_loss = float(changed[~label].mean() / plain[~label].mean()) - 1
        return contrast(plain, label) - contrast(changed, label), secure_loss

    def best_scale(target: dict[int, float]) -> tuple[float, dict[int, float]]:
        """The strongest edit along `target` under which the secure twin stays as likely."""
        best: tuple[float, dict[int, float]] = (-np.inf, {})
        for scale in SCALES:
            scaled = {j: scale * v for j, v in target.items()}
            gain, secure_loss = effect(scaled)
            if secure_loss <= DEARER and gain > best[0]:
                best = gain, scaled
        return best

    direction: dict[int, float] = {}
    for _ in range(LATENTS):  # greedily: the best, then its best companion
        tried = {
            int(j): best_scale({**direction, int(j): float(height[j])})
            for j in candidates
            if int(j) not in direction
        }
        best = max(tried, key=lambda j: tried[j][0])
        direction[best] = float(height[best])
    _, chosen = best_scale(direction)
    everyday = float(output_logprob(lm, ordinary, info.layer).mean())
    everyday_changed = float(output_logprob(lm, ordinary, info.layer, edit(chosen)).mean())

    rng = np.random.default_rng(seed)
    size = float(np.mean(list(chosen.values())) / np.mean([height[k] for k in chosen]))
    controls = [
        effect({int(j): size * float(height[j]) for j in drawn})[0]
        for drawn in (rng.choice(alive, LATENTS, replace=False) for _ in range(CONTROLS))
    ]
    return Steering(
        {j: round(v, 3) for j, v in chosen.items()},
        {
            "unit": "nats per token by which the insecure twin loses against the secure one",
            "texts": len(texts),
            "effect": round(effect(chosen)[0], 4),
            "random_latents_mean": round(float(np.mean(controls)), 4),
            "random_latents_most": round(float(np.max(controls)), 4),
            "random_draws": CONTROLS,
            "secure_twin_loss_change": round(effect(chosen)[1], 4),
            "ordinary_loss_change_always_on": round(everyday_changed / everyday - 1, 4),
        },
    )
