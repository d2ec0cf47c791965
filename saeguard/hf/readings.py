"""Engines that read the feature values of texts; this one is Transformers, vLLM's is offline."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol, TypeAlias

import numpy as np

from saeguard.features.model_fit import ModelShape, check_fit
from saeguard.guard.readings import Reading, most_tokens, reading_of
from saeguard.guard.roles.assign import roles_of
from saeguard.guard.watchlist import WatchList
from saeguard.hf.model import LanguageModel
from saeguard.hf.residuals import record
from saeguard.hf.scan import Seen, activations, role_marks_for
from saeguard.hf.texts import Text

TEXTS = 256
"""Most texts that are sorted by length together; a run that is cut off repeats at most so many."""

TextReading: TypeAlias = tuple[Text, Reading]


class Engine(Protocol):
    """Reads the values of features at every token of texts."""

    features: tuple[str, ...]
    """`feature_set/feature` of each column of a reading."""
    shape: ModelShape
    longest: int | None
    """Most tokens of a text; None if the tokenizer's bound is the only one."""

    def read(self, texts: Iterable[Text]) -> Iterator[TextReading]:
        """Yield every text with its reading, in order; only few texts are held at a time.

        Raises:
            CannotRunError: the engine failed, or did not read all tokens of a text.
        """

    def close(self) -> None:
        """End the engine's processes."""


class TransformersEngine:
    """Reads texts with a Transformers model, batched by length."""

    longest: int | None = None

    def __init__(self, lm: LanguageModel, readings: WatchList) -> None:
        """Take a model, and the features to read of it.

        Args:
            lm: the model.
            readings: of `build_readings`.

        Raises:
            ModelFitError: a feature set was made for another model.
        """
        for made_for in readings.models:
            check_fit(made_for, lm.shape, at="the feature set")
        self.lm = lm
        self.readings = readings
        self.features = readings.features
        self.shape = lm.shape

    def read(self, texts: Iterable[Text]) -> Iterator[TextReading]:
        """Yield every text with its reading, in order."""
        excluded = np.array(self.readings.exclude_tokens, np.int64)
        layers = [hook.layer for hook in self.readings.hooks]
        for some in _groups(texts, most_tokens(len(self.features))):
            found: dict[int, Reading] = {}
            for i, residuals in record(self.lm, [text.tokens for text in some], layers):
                f = activations(self.readings, residuals)
                eligible = ~np.isin(np.array(some[i].tokens), excluded)
                read = self.readings.read(f)  # whose shares are the features' values
                found[i] = reading_of(read.shares, eligible, read.finite, read.massive)
            yield from ((text, found[i]) for i, text in enumerate(some))

    def close(self) -> None:
        """Do nothing: the model goes with the process."""


def _groups(texts: Iterable[Text], tokens: int) -> Iterator[list[Text]]:
    """Yield the texts in groups of at most `TEXTS` texts and `tokens` tokens, or one text."""
    some: list[Text] = []
    held = 0
    for text in texts:
        if some and (len(some) == TEXTS or held + len(text.tokens) > tokens):
            yield some
            some, held = [], 0
        some.append(text)
        held += len(text.tokens)
    if some:
        yield some


def see_texts(
    engine: Engine, watchlist: WatchList, tokenizer: Any, texts: Iterable[Text]
) -> Iterator[tuple[Text, Seen]]:
    """Yield every text with what the rules judge it by, in order; residuals are not kept.

    Args:
        engine: reads the watch list's features, and maybe others.
        watchlist: of the policies.
        tokenizer: the model's, whose chat template delimits roles.
        texts: in any number; only few are held at a time.

    Raises:
        RolesError: a policy's scope is a role that the chat template does not identify.
        CannotRunError: the engine failed, or did not read all tokens of a text.
    """
    marks = role_marks_for(tokenizer, watchlist)
    columns = [engine.features.index(name) for name in watchlist.features]
    for i, (text, reading) in enumerate(engine.read(texts)):
        shares = (reading.values[:, columns] - watchlist.low) / watchlist.span
        prompt, roles = text.prompt_tokens, None
        if marks is not None:
            roles = roles_of(marks, np.array(text.tokens[:prompt], np.int64))
        yield text, Seen(i, shares, reading.evaluable, reading.massive, prompt, roles, {})
