"""Record feature values of texts with a Hugging Face model, for policies to be judged on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from saeguard.features.calibrate import values
from saeguard.features.files import read_feature_set_file
from saeguard.features.load import load_feature_set
from saeguard.guard.roles.assign import RoleMarks, roles_of
from saeguard.guard.roles.chat_template import role_marks_of
from saeguard.guard.scopes import OUTPUT
from saeguard.hf.corpus import make_corpus
from saeguard.hf.model import LanguageModel, check_model
from saeguard.hf.texts import Text
from saeguard.policy_tools.recording import Recording, definition

TEXTS = 256
"""Texts whose residuals are held in memory at a time."""


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
        FeatureSetError, ModelError, SaeError, ProbeError: a set does not fit the model or its
            checkpoints.
    """
    sets = [load_feature_set(file) for file in feature_sets]
    documents = [read_feature_set_file(file) for file in feature_sets]
    for features in sets:
        check_model(lm, features)
    excluded = sorted({token for features in sets for token in features.exclude_tokens})
    columns: list[np.ndarray] = []
    for features in sets:
        blocks: list[list[np.ndarray]] = []
        for start in range(0, len(texts), TEXTS):
            some = texts[start : start + TEXTS]
            corpus = make_corpus(lm, some, features.layers, excluded, features.id)
            blocks.append([values(features, f, corpus) for f in features.features.values()])
        columns += [np.concatenate(parts) for parts in zip(*blocks, strict=True)]
    marks = role_marks_of(lm.tokenizer)
    roles = None
    if isinstance(marks, RoleMarks):
        parts = [np.full(len(text.tokens), OUTPUT, np.uint8) for text in texts]
        for part, text in zip(parts, texts, strict=True):
            prompt = np.array(text.tokens[: text.prompt_tokens], np.int64)
            part[: len(prompt)] = roles_of(marks, prompt)
        roles = np.concatenate(parts)
    tokens = np.concatenate([np.array(text.tokens, np.int64) for text in texts])
    return Recording(
        path=path,
        model=lm.name,
        ids=tuple(text.id for text in texts),
        lengths=np.array([len(text.tokens) for text in texts], np.int64),
        prompt_tokens=np.array([text.prompt_tokens for text in texts], np.int64),
        evaluable=~np.isin(tokens, np.array(excluded, np.int64)),
        definitions={
            f"{document.id}/{name}": definition(document, name)
            for document in documents
            for name in document.features
        },
        values=np.stack(columns, 1).astype(np.float32),
        roles=roles,
        no_roles=marks if isinstance(marks, str) else "",
        pieces=tuple(lm.tokenizer.decode([int(t)]) for t in tokens) if with_text else None,
    )
