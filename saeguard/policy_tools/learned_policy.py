"""A shadow policy for a learnt feature, its tests, and the recorded texts that they judge."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import NamedTuple

import numpy as np

from saeguard.features.calibrate import shares, values
from saeguard.features.corpus import Corpus, peaks
from saeguard.features.files import read_feature_set_file
from saeguard.features.learn import Learned, Wish, held_out
from saeguard.features.reading import read_words
from saeguard.features.types import Feature, FeatureSet
from saeguard.policy_tools.recording import Recording, definition, write_recording
from saeguard.policy_tools.scaffold import Draft, Recorded, draft


class Written(NamedTuple):
    """A policy's id and its files, before they are written."""

    id: str
    policy: Path
    tests: Path
    recording: Path


def paths_of(learned: Learned, folder: Path) -> Written:
    """Return where the policy of a learnt feature lies below the folder of policies."""
    behaviour, name = (
        part.replace("_", "-") for part in (learned.subject.behaviour, learned.subject.name)
    )
    base = folder / behaviour / name
    return Written(
        f"{behaviour}.{name}",
        base.with_suffix(".yaml"),
        base.with_suffix(".test.yaml"),
        base.with_suffix(".safetensors"),
    )


def texts_of(
    learned: Learned,
    features: FeatureSet,
    above: float,
    wish: Wish,
    at: Written,
    *,
    owner: str,
    schema: str,
    model: str,
    today: date,
) -> dict[Path, str]:
    """Return the text of the policy and of its tests; write the recording that they name.

    Args:
        learned: a feature that was learnt.
        features: the set that holds it, as it was written.
        above: threshold of the policy.
        wish: how the feature was calibrated.
        at: where the files will lie.
        owner: of the policy.
        schema: path of the folder with the JSON Schemas, from the policy's folder.
        model: name of the model that read the texts.
        today: the day of review is half a year later.
    """
    subject, feature = learned.subject, learned.feature
    assert feature is not None
    corpus, ids = held_out(subject, wish.scope)
    value = values(features, feature, corpus)
    picked = list(_cases(corpus, feature, value, above))
    if picked:
        _record([text for text, _, _ in picked], corpus, ids, value, features, feature, at, model)
    held = feature.evidence["holdout"]
    low, high = held["interval"]
    rationale = (
        f"Learnt from labelled texts of {subject.name} ({feature.evidence['form']}). On held-out "
        f"templates the AUROC is {held['auroc']:.3f} (95 %: {low:.3f} to {high:.3f})."
    )
    wanted = Draft(
        id=at.id,
        feature_set=features.id,
        thresholds={feature.id: above},
        scope=wish.scope,
        reading=read_words(feature.evidence["window"]),
        title=subject.title,
        owner=owner,
        rationale=rationale,
        recorded=[
            Recorded(name, at.recording.name, str(ids[text]), expect)
            for text, name, expect in picked
        ],
    )
    policy, tests = draft(wanted, schema, today)
    return {at.policy: policy, at.tests: tests}


def _cases(
    corpus: Corpus, feature: Feature, value: np.ndarray, above: float
) -> Iterator[tuple[int, str, str]]:
    """Yield the hold-out's clearest positive and its nearest negative: index, name, verdict."""
    share = peaks(corpus, shares(feature, value), read_words(feature.evidence["window"]))
    caught = np.flatnonzero(corpus.label & (share > above))
    quiet = np.flatnonzero(~corpus.label & (share <= above))
    if len(caught):
        best = caught[share[caught].argmax()]
        yield int(best), "the hold-out's clearest text that shows it", "match"
    if len(quiet):
        nearest = quiet[share[quiet].argmax()]
        yield int(nearest), "the hold-out's nearest text that does not", "no_match"


def _record(
    texts: list[int],
    corpus: Corpus,
    ids: np.ndarray,
    value: np.ndarray,
    features: FeatureSet,
    feature: Feature,
    at: Written,
    model: str,
) -> None:
    spans = [slice(int(corpus.starts[i]), int(corpus.starts[i] + corpus.lengths[i])) for i in texts]
    document = read_feature_set_file(features.path)
    tokens = np.concatenate([corpus.tokens[span] for span in spans])
    excluded = np.isin(tokens, features.exclude_tokens)
    recording = Recording(
        path=at.recording,
        model=model,
        ids=tuple(str(ids[i]) for i in texts),
        lengths=corpus.lengths[texts],
        prompt_tokens=np.array([int((~corpus.output[span]).sum()) for span in spans], np.int64),
        evaluable=~excluded,
        massive=np.concatenate([corpus.special[span] for span in spans]) & ~excluded,
        definitions={f"{features.id}/{feature.id}": definition(document, feature.id)},
        values=np.concatenate([value[span] for span in spans])[:, None].astype(np.float32),
        no_roles="a learnt policy's recording holds none",
    )
    write_recording(recording, at.recording)
