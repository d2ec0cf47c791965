"""Record feature values of texts, for policies to be judged on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from saeguard.features.files import read_feature_set_file
from saeguard.features.load import load_feature_set
from saeguard.guard.build_watchlist import build_readings
from saeguard.guard.roles.assign import RoleMarks, roles_of
from saeguard.guard.roles.chat_template import role_marks_of
from saeguard.guard.scopes import OUTPUT
from saeguard.hf.model import LanguageModel
from saeguard.hf.readings import Engine, TransformersEngine
from saeguard.hf.texts import Text
from saeguard.policy_tools.recording import Recording, definition


class Recorded(NamedTuple):
    """What a recording holds of one text."""

    text: Text
    values: np.ndarray
    """[tokens, features] float32."""
    evaluable: np.ndarray
    """[tokens] bool."""
    massive: np.ndarray
    """[tokens] bool: attention sinks."""
    roles: np.ndarray | None
    """[tokens] uint8, None if the chat template does not delimit roles."""
    pieces: tuple[str, ...] | None
    """What each token spells, None if that is not wanted."""


def definitions(feature_sets: Sequence[Path]) -> dict[str, str]:
    """Return `set/feature` of every feature, with the digest of what it is made of.

    Raises:
        FeatureSetError: a file is wrong.
    """
    documents = [read_feature_set_file(file) for file in feature_sets]
    return {
        f"{document.id}/{name}": definition(document, name)
        for document in documents
        for name in document.features
    }


def recorded(
    engine: Engine,
    features: Sequence[str],
    tokenizer: Any,
    texts: Iterable[Text],
    *,
    with_text: bool = False,
) -> Iterator[Recorded]:
    """Yield what a recording holds of each text, in order.

    Args:
        engine: that reads the features.
        features: `set/feature` of each column.
        tokenizer: the model's.
        texts: none of them empty.
        with_text: keep what each token spells.

    Raises:
        CannotRunError: the engine failed, or did not read all tokens of a text.
    """
    columns = [engine.features.index(name) for name in features]
    marks = role_marks_of(tokenizer)
    for text, reading in engine.read(texts):
        roles = None
        if isinstance(marks, RoleMarks):
            roles = np.full(len(text.tokens), OUTPUT, np.uint8)
            prompt = np.array(text.tokens[: text.prompt_tokens], np.int64)
            roles[: len(prompt)] = roles_of(marks, prompt)
        pieces = tuple(tokenizer.decode([t]) for t in text.tokens) if with_text else None
        values = np.ascontiguousarray(reading.values[:, columns])
        yield Recorded(text, values, reading.evaluable, reading.massive, roles, pieces)


def record_features(
    lm: LanguageModel,
    feature_sets: Sequence[Path],
    texts: Sequence[Text],
    *,
    path: Path,
    with_text: bool = False,
) -> Recording:
    """Return the value of every feature of `feature_sets` at every token of `texts`.

    Args:
        lm: the model the feature sets were made for.
        feature_sets: their files.
        texts: none of them empty.
        path: of the recording, for messages.
        with_text: keep what each token spells.

    Raises:
        FeatureSetError, ModelFitError, WatchListError: a set does not fit the model or its
            checkpoints.
    """
    columns = definitions(feature_sets)
    sets = {features.id: features for features in map(load_feature_set, feature_sets)}
    engine = TransformersEngine(lm, build_readings(columns, sets))
    parts = list(recorded(engine, list(columns), lm.tokenizer, texts, with_text=with_text))
    marks = role_marks_of(lm.tokenizer)
    roles = [part.roles for part in parts if part.roles is not None]
    return Recording(
        path=path,
        model=lm.name,
        ids=tuple(part.text.id for part in parts),
        lengths=np.array([len(part.values) for part in parts], np.int64),
        prompt_tokens=np.array([part.text.prompt_tokens for part in parts], np.int64),
        evaluable=np.concatenate([part.evaluable for part in parts]),
        massive=np.concatenate([part.massive for part in parts]),
        definitions=columns,
        values=np.concatenate([part.values for part in parts]),
        roles=np.concatenate(roles) if roles else None,
        no_roles=marks if isinstance(marks, str) else "",
        pieces=tuple(p for part in parts for p in part.pieces or ()) if with_text else None,
    )
