"""Fit linear probes: the largest logit over a text separates texts that show a behaviour.

A probe is a logistic regression with an L2 penalty on standardised residuals, folded back into the
residual's own units. On several layers it reads their residuals side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from saeguard.features.corpus import Corpus, peaks
from saeguard.features.latent_groups import folds
from saeguard.features.probe import Probe
from saeguard.features.reading import PEAK, Reading
from saeguard.features.stats import auroc

RECIPES = ("mean", "tokens", "last", "peak")
"""What a text is in training: the mean of its tokens, each of them, its last, or its strongest."""
STRENGTHS = (0.0001, 0.001, 0.01, 0.1)
"""Inverse L2 penalties, on standardised residuals."""
MOST_TOKENS = 8000
"""Tokens that are drawn to fit on, and to standardise by; each text has the same chance."""
BETTER = 0.01
"""AUROC in validation by which a reading at the end of a text must beat the strongest token, which
can stop and clamp, to be chosen."""
ROUNDS = 3
"""Of picking each text's strongest token and fitting again, as in multiple-instance learning."""


class Fitted(NamedTuple):
    """A probe that was fitted on all of the search split."""

    probe: Probe
    validated: float
    """AUROC on templates left out of the fit; recipe, penalty and reading were chosen by it."""
    reading: Reading = PEAK


class Inputs(NamedTuple):
    """What a fit reads of a corpus at some of its layers."""

    corpus: Corpus
    parts: tuple[torch.Tensor, ...]
    """[T, d_in] residuals of each layer, views."""
    means: np.ndarray
    """[texts, layers * d_in] mean of each text's tokens in scope."""

    def rows(self, tokens: np.ndarray) -> np.ndarray:
        """Return [tokens, layers * d_in] residuals of the tokens with these indices."""
        which = torch.from_numpy(tokens)
        return torch.cat([part[which] for part in self.parts], 1).numpy()

    def logits(self, w: np.ndarray) -> np.ndarray:
        """Return [T, columns] float32 without bias for the directions `w` [layers * d_in, columns].

        The residuals are not copied: they may be larger than memory.
        """
        weights = torch.split(torch.from_numpy(w.astype(np.float32)), self.parts[0].shape[1])
        out = self.parts[0] @ weights[0]
        for part, weight in zip(self.parts[1:], weights[1:], strict=True):
            out += part @ weight
        found: np.ndarray = out.numpy()
        return found


def fit_probe(
    corpus: Corpus,
    seed: int,
    layers: Sequence[int] | None = None,
    readings: Sequence[Reading] = (PEAK,),
) -> Fitted:
    """Fit a probe by what does best on templates left out of the fit: recipe, penalty, reading.

    Args:
        corpus: the search split; nothing else may choose.
        seed: of the choice of tokens, if there are too many.
        layers: what it reads; None for all of the corpus's layers.
        readings: of a text's tokens, to choose from; a later one must be better by `BETTER`.
    """
    layers = corpus.layers if layers is None else tuple(layers)
    inputs = _inputs(corpus, layers)
    options = [(recipe, strength) for recipe in RECIPES for strength in STRENGTHS]
    areas = np.zeros((len(readings), len(options)))
    splits = list(folds(corpus))
    for train, held in splits:
        w = np.stack([w for w, _ in _fit_all(inputs, train, RECIPES, STRENGTHS, seed)], 1)
        values = inputs.logits(w)
        for i, reading in enumerate(readings):
            areas[i] += auroc(peaks(corpus, values, reading)[held], corpus.label[held])
    areas = np.round(areas / max(len(splits), 1), 6)
    tops = areas.max(axis=1) - BETTER * (np.arange(len(readings)) > 0)
    chosen = int(tops.argmax())
    best = int(areas[chosen].argmax())
    recipe, strength = options[best]
    ((w, b),) = _fit_all(inputs, np.ones(len(corpus), bool), (recipe,), (strength,), seed)
    note = f"logistic regression on {recipe}, C={strength}"
    rows = w.astype(np.float32).reshape(len(layers), -1)
    return Fitted(Probe(layers, rows, b, note), float(areas[chosen, best]), readings[chosen])


def _inputs(corpus: Corpus, layers: Sequence[int]) -> Inputs:
    parts = tuple(corpus.at(layer) for layer in layers)
    width = parts[0].shape[1]
    means = np.empty((len(corpus), len(parts) * width), np.float32)
    looked = torch.from_numpy(corpus.looked)
    edges = [*corpus.starts.tolist(), len(corpus.tokens)]
    for i in range(len(corpus)):
        text = slice(edges[i], edges[i + 1])
        for j, part in enumerate(parts):
            means[i, j * width : (j + 1) * width] = part[text][looked[text]].mean(0).numpy()
    return Inputs(corpus, parts, means)


def _fit_all(
    inputs: Inputs,
    train: np.ndarray,
    recipes: Sequence[str],
    strengths: Sequence[float],
    seed: int,
) -> Iterator[tuple[np.ndarray, float]]:
    """Yield a direction [layers * d_in] and a bias for each recipe, and for each penalty of it.

    Args:
        inputs: of the search split.
        train: [texts] bool, the texts to fit on.
        recipes: some of `RECIPES`.
        strengths: inverse penalties.
        seed: of the choice of tokens.
    """
    corpus = inputs.corpus
    label = corpus.label[train]
    tokens = np.flatnonzero(corpus.looked & train[corpus.owner])
    drawn = _drawn(corpus, tokens, seed)
    x = inputs.rows(drawn)
    fit = partial(_logistic, StandardScaler().fit(x))
    for recipe in recipes:
        if recipe == "last":
            ends = _strongest(corpus, np.arange(len(corpus.tokens)))[train]
            fitted = [fit(inputs.rows(ends), label, c) for c in strengths]
        elif recipe == "tokens":
            of_token = corpus.label[corpus.owner[drawn]]
            fitted = [fit(x, of_token, c) for c in strengths]
        else:
            fitted = [fit(inputs.means[train], label, c) for c in strengths]
        for _ in range(ROUNDS if recipe == "peak" else 0):
            values = inputs.logits(np.stack([w for w, _ in fitted], 1))
            peak = [_strongest(corpus, column)[train] for column in values.T]
            fitted = [fit(inputs.rows(at), label, c) for at, c in zip(peak, strengths, strict=True)]
        yield from fitted


def _drawn(corpus: Corpus, tokens: np.ndarray, seed: int) -> np.ndarray:
    """Return at most `MOST_TOKENS` of some tokens, drawn with weights that make texts equal.

    The largest `u ** (1 / weight)` of random `u` are a weighted sample without replacement
    (Efraimidis and Spirakis, 2006); a token's weight is one over its text's tokens.
    """
    owner = corpus.owner[tokens]
    counts = np.bincount(owner, minlength=len(corpus))[owner]
    keys = np.log(np.random.default_rng(seed).random(len(tokens))) * counts
    drawn: np.ndarray = tokens[np.argsort(-keys, kind="stable")[:MOST_TOKENS]]
    return drawn


def _strongest(corpus: Corpus, value: np.ndarray) -> np.ndarray:
    """Return [texts] the index of each text's token in scope of the highest `value` [T]."""
    seen = np.where(corpus.looked, value, -np.inf)
    order = np.lexsort((-seen, corpus.owner))
    out: np.ndarray = order[corpus.starts]
    return out


def _logistic(
    scaler: StandardScaler, x: np.ndarray, label: np.ndarray, strength: float
) -> tuple[np.ndarray, float]:
    """Return direction and bias in the units of `x` [rows, width]."""
    model = LogisticRegression(C=strength, class_weight="balanced", max_iter=1000)
    model.fit(scaler.transform(x), label)
    w = model.coef_[0] / scaler.scale_
    return w, float(model.intercept_[0] - scaler.mean_ @ w)
