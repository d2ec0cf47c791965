"""A shadow policy for a learnt feature, its tests, and the recorded texts that they judge."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

import numpy as np

from saeguard.features.calibrate import shares, values
from saeguard.features.corpus import Corpus
from saeguard.features.files import read_feature_set_file
from saeguard.features.joint import margins
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
    above: Mapping[str, float],
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
        above: the policy's threshold for each feature that it asks for.
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
    asked = [features.features[name] for name in above]
    value = [values(features, f, corpus) for f in asked]
    share = [shares(f, v) for f, v in zip(asked, value, strict=True)]
    reading = read_words(feature.evidence["window"])
    picked = list(_cases(corpus, margins(share, [*above.values()], corpus, reading)))
    if picked:
        _record([text for text, _, _ in picked], corpus, ids, value, features, asked, at, model)
    wanted = Draft(
        id=at.id,
        feature_set=features.id,
        thresholds=above,
        scope=wish.scope,
        reading=reading,
        combine="token" if reading.last else "request",
        title=subject.title,
        owner=owner,
        rationale=_rationale(subject.name, feature),
        recorded=[
            Recorded(name, at.recording.name, str(ids[text]), expect)
            for text, name, expect in picked
        ],
    )
    policy, tests = draft(wanted, schema, today)
    return {at.policy: policy, at.tests: tests}


def _rationale(name: str, feature: Feature) -> str:
    evidence = feature.evidence
    held = evidence["holdout"]
    low, high = held["interval"]
    learnt = (
        f"Learnt from labelled texts of {name} ({evidence['form']}). On held-out templates the "
        f"AUROC is {held['auroc']:.3f} (95 %: {low:.3f} to {high:.3f})."
    )
    both = evidence.get("with_topic")
    if both is None:
        return learnt
    caught, twins, ordinary = (
        f"{both[key]['hits']} of {both[key]['texts']}"
        for key in ("tpr_holdout", "twin_rate_holdout", "fpr_holdout")
    )
    return (
        f"{learnt} With its topic it matches {caught} of those that show it, {twins} twins and "
        f"{ordinary} ordinary texts."
    )


def _cases(corpus: Corpus, margin: np.ndarray) -> Iterator[tuple[int, str, str]]:
    """Yield the hold-out's clearest positive and its nearest negative: index, name, verdict.

    Args:
        corpus: the hold-out.
        margin: [texts] by how much each exceeds all thresholds.
    """
    caught = np.flatnonzero(corpus.label & (margin > 0))
    quiet = np.flatnonzero(~corpus.label & (margin <= 0))
    if len(caught):
        best = caught[margin[caught].argmax()]
        yield int(best), "the hold-out's clearest text that shows it", "match"
    if len(quiet):
        nearest = quiet[margin[quiet].argmax()]
        yield int(nearest), "the hold-out's nearest text that does not", "no_match"


def _record(
    texts: list[int],
    corpus: Corpus,
    ids: np.ndarray,
    value: Sequence[np.ndarray],
    features: FeatureSet,
    asked: Sequence[Feature],
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
        definitions={f"{features.id}/{f.id}": definition(document, f.id) for f in asked},
        values=np.stack(
            [np.concatenate([v[span] for span in spans]) for v in value], axis=1
        ).astype(np.float32),
        no_roles="a learnt policy's recording holds none",
    )
    write_recording(recording, at.recording)
