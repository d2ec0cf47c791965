"""Recorded texts: residuals of many texts one after the other, with labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
import torch

from saeguard.features.massive import MeasuredNorms, is_massive, measure_norms
from saeguard.features.reading import PEAK, Reading
from saeguard.features.room import stacked, taken
from saeguard.features.window import window_score

Scope = Literal["prompt", "output", "both"]


@dataclass(frozen=True, slots=True)
class Corpus:
    """Texts and the residual of each of their tokens; T tokens in all."""

    x: torch.Tensor
    """[T, layers * d_in] float32: the residuals of each layer, side by side."""
    layers: tuple[int, ...]
    """`resid_post` of these blocks, in ascending order."""
    tokens: np.ndarray
    """[T] token ids."""
    lengths: np.ndarray
    """[texts] tokens of each text."""
    output: np.ndarray
    """[T] bool: whether the token is output rather than prompt."""
    special: np.ndarray
    """[T] bool: tokens never evaluated, by id or because they are attention sinks."""
    label: np.ndarray
    """[texts] bool: whether the text shows the behaviour."""
    kind: np.ndarray
    template: np.ndarray
    """[texts] name of the near copies a text belongs to."""
    scope: Scope = "output"

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.lengths)

    @property
    def starts(self) -> np.ndarray:
        """[texts] first token of each text."""
        out: np.ndarray = np.cumsum(self.lengths) - self.lengths
        return out

    @property
    def owner(self) -> np.ndarray:
        """[T] index of the text a token belongs to."""
        return np.repeat(np.arange(len(self)), self.lengths)

    @property
    def looked(self) -> np.ndarray:
        """[T] bool: tokens in scope and not special."""
        everywhere = np.ones(len(self.output), bool)
        scope = {"output": self.output, "prompt": ~self.output, "both": everywhere}[self.scope]
        out: np.ndarray = scope & ~self.special
        return out

    def at(self, layer: int) -> torch.Tensor:
        """Return the residuals [T, d_in] of one of the layers, a view."""
        width = self.x.shape[1] // len(self.layers)
        start = self.layers.index(layer) * width
        return self.x[:, start : start + width]

    @property
    def by_layer(self) -> dict[int, torch.Tensor]:
        """The residuals [T, d_in] by layer, views."""
        return {layer: self.at(layer) for layer in self.layers}

    def norm(self, layer: int) -> np.ndarray:
        """Return the norms [T] float32 of the residuals of one of the layers."""
        out: np.ndarray = torch.linalg.vector_norm(self.at(layer), dim=1).numpy()
        return out

    @property
    def position(self) -> np.ndarray:
        """[T] position of each token in its text."""
        out: np.ndarray = np.arange(len(self.tokens)) - self.starts[self.owner]
        return out

    def without_massive(self, bounds: Mapping[int, float]) -> Corpus:
        """Return the corpus with attention sinks counted as special.

        Args:
            bounds: by layer, the norm above which a token is one.
        """
        massive = [is_massive(self.norm(n), bounds[n]) for n in self.layers if n in bounds]
        return replace(self, special=np.logical_or.reduce([self.special, *massive]))

    def scoped(self, scope: Scope) -> Corpus:
        """Return the corpus read in another scope, without the texts that have no token in it."""
        changed, kept = replace(self, scope=scope), self.scoped_texts(scope)
        return changed if kept.all() else changed.select(kept)

    def scoped_texts(self, scope: Scope) -> np.ndarray:
        """Return which texts have a token in a scope, [texts] bool."""
        looked = replace(self, scope=scope).looked
        out: np.ndarray = np.bincount(self.owner, weights=looked, minlength=len(self)) > 0
        return out

    def select(self, texts: np.ndarray) -> Corpus:
        """Return the texts at which the mask [texts] is true."""
        tokens = texts[self.owner]
        return replace(
            self,
            x=taken(self.x, torch.from_numpy(tokens)),
            tokens=self.tokens[tokens],
            lengths=self.lengths[texts],
            output=self.output[tokens],
            special=self.special[tokens],
            label=self.label[texts],
            kind=self.kind[texts],
            template=self.template[texts],
        )

    def of_kind(self, kind: str | None) -> Corpus:
        """Return the positives of one kind with every negative; all if `kind` is None."""
        return self if kind is None else self.select(~self.label | (self.kind == kind))


def norms_of(
    corpus: Corpus, chosen: Mapping[int, float] | None = None
) -> tuple[dict[int, float], dict[int, MeasuredNorms]]:
    """Return by layer a bound on the norm, and the statistics of the norms.

    Args:
        corpus: ordinary texts; special tokens are left out.
        chosen: bounds that a person chose, by layer; the others are measured.

    Raises:
        ValueError: every token is special.
    """
    kept, bounds, norms = ~corpus.special, {}, {}
    position = corpus.position[kept]
    for layer in corpus.layers:
        given = (chosen or {}).get(layer)
        bounds[layer], norms[layer] = measure_norms(corpus.norm(layer)[kept], position, given)
    return bounds, norms


def join(first: Corpus, second: Corpus) -> Corpus:
    """Return the texts of both, in the first one's scope."""

    def both(name: str) -> np.ndarray:
        out: np.ndarray = np.concatenate([getattr(first, name), getattr(second, name)])
        return out

    return Corpus(
        x=stacked([first.x, second.x]),
        layers=first.layers,
        tokens=both("tokens"),
        lengths=both("lengths"),
        output=both("output"),
        special=both("special"),
        label=both("label"),
        kind=both("kind"),
        template=both("template"),
        scope=first.scope,
    )


def with_ordinary(labelled: Corpus, ordinary: Corpus) -> Corpus:
    """Add ordinary texts as negatives, evenly spread, as many as the labelled negatives.

    Labelled negatives are near twins of the positives; without ordinary texts among the negatives
    a detector may fire on all of them.
    """
    wanted = min(int((~labelled.label).sum()), len(ordinary))
    picked = np.zeros(len(ordinary), bool)
    picked[np.linspace(0, len(ordinary) - 1, wanted).astype(int)] = True
    return join(labelled, ordinary.select(picked))


def peaks(corpus: Corpus, values: np.ndarray, reading: Reading = PEAK) -> np.ndarray:
    """Return each text's value, as serving reads it; by default that of its strongest token.

    Args:
        corpus: the texts; each has a token in scope.
        values: [T] or [T, columns], one value per token.
        reading: how the values of its tokens become the text's.

    Returns:
        [texts] or [texts, columns] float32.
    """
    if reading.last:
        return _at_the_end(corpus, values, mean=reading.mean)
    looked = corpus.looked.reshape(-1, *[1] * (values.ndim - 1))
    values = np.where(looked, values, -np.inf)
    k, n = reading.k, reading.n
    if n > 1:
        edges = [*corpus.starts, len(values)]
        values = np.concatenate([window_score(values[a:b], k, n) for a, b in pairwise(edges)])
    out: np.ndarray = np.maximum.reduceat(values, corpus.starts, axis=0)
    return out.astype(np.float32)


def _at_the_end(corpus: Corpus, values: np.ndarray, *, mean: bool) -> np.ndarray:
    """Return the value of each text's last token in scope, or the mean of those in scope."""
    looked = np.flatnonzero(corpus.looked)
    counts = np.bincount(corpus.owner[looked], minlength=len(corpus))
    ends = np.cumsum(counts)
    if not mean:
        out: np.ndarray = values[looked[ends - 1]].astype(np.float32)
        return out
    sums = np.add.reduceat(values[looked].astype(np.float64), ends - counts, axis=0)
    means: np.ndarray = (sums.T / counts).T.astype(np.float32)
    return means
