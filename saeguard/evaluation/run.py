"""The whole evaluation: judge, measure, compare with baselines, and look at the worst texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from saeguard.evaluation import baselines
from saeguard.evaluation.choose import part_of
from saeguard.evaluation.compare import Compared, compare
from saeguard.evaluation.datasets import Dataset, EvaluationError, Part
from saeguard.evaluation.explain import explain
from saeguard.evaluation.figures import Detector, by_kind, measure
from saeguard.evaluation.judging import Engine, Keys, Work, judge_all
from saeguard.evaluation.results import Evaluation, Ordinary, Row, Section
from saeguard.evaluation.store import Store
from saeguard.evaluation.verdicts import Verdicts, firing_rate, read_verdicts
from saeguard.evaluation.worst import Example, choose_worst
from saeguard.guard.watchlist import WatchList
from saeguard.hf.model import LanguageModel
from saeguard.policy.types import Policy


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured besides the policies."""

    length: bool = True
    words: bool = True
    probe: bool = True
    judge: bool = False
    worst: int = 5
    """False positives and false negatives that are shown of each policy on each dataset."""
    seed: int = 0
    """Of the resampling."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is evaluated, and what reads it."""

    watchlist: WatchList
    lm: LanguageModel | None
    """What is asked for its own answer; None if vLLM runs the model."""
    tokenizer: Any
    engine: Engine
    keys: Keys
    datasets: tuple[Dataset, ...]
    pairs: tuple[tuple[int, int], ...]
    """Indices of policy and dataset."""
    benign: tuple[Dataset, ...]

    def policies_of(self, dataset: int) -> tuple[int, ...]:
        """Return the policies that are judged on a dataset."""
        return tuple(i for i, j in self.pairs if j == dataset)

    def layers_of(self, policy: int) -> set[int]:
        """Return the layers whose residuals a policy's features read."""
        wl, p = self.watchlist, self.watchlist.policies[policy]
        features = [wl.features.index(f"{p.feature_set}/{s.feature}") for s in p.detect.values()]
        columns = [column for feature in features for column, _ in wl.latents(feature)]
        return {
            hook.layer
            for hook in wl.hooks
            for column in columns
            if hook.first_column <= column < hook.first_column + hook.W.shape[0]
        }

    def read_by(self, policies: Sequence[int]) -> tuple[tuple[int, Part], ...]:
        """Return the layers and parts of a text that policies read."""
        found = {
            (layer, part_of(self.watchlist.policies[i].scope))
            for i in policies
            for layer in self.layers_of(i)
        }
        return tuple(sorted(found))


def evaluate(
    inputs: Inputs, options: Options, store: Store, facts: Mapping[str, Any]
) -> Evaluation:
    """Judge every text that the store does not know, and return the report.

    Raises:
        EvaluationError: a file has changed meanwhile, or there is nothing to judge.
    """
    if not inputs.datasets and not inputs.benign:
        raise EvaluationError("no text to judge; give --data, --benign or both")
    everything = tuple(range(len(inputs.watchlist.policies)))
    judged = [(d, inputs.policies_of(j)) for j, d in enumerate(inputs.datasets)]
    sample = _sample(inputs.benign)
    asked = everything if inputs.pairs else ()
    work = [
        Work(d, some, inputs.read_by(some) if options.probe else ()) for d, some in judged if some
    ]
    work += [
        Work(d, everything, inputs.read_by(asked) if options.probe else (), mask)
        for d, mask in zip(inputs.benign, sample, strict=True)
    ]
    judge_all(work, inputs.engine, inputs.tokenizer, store, inputs.keys)
    of_benign = [
        [read_verdicts(store, d, inputs.keys.policies[i]) for d in inputs.benign]
        for i in everything
    ]
    sections = _sections(inputs, judged, options, store, of_benign, sample)
    ordinary = [_ordinary(inputs.benign, found, options.worst) for found in of_benign]
    found = Evaluation(
        policies=inputs.watchlist.policies,
        names=names_of(inputs.watchlist.policies),
        sections=tuple(sections),
        ordinary=tuple(ordinary) if inputs.benign else (),
        benign=inputs.benign,
        facts=facts,
    )
    return explain(found, inputs.engine, inputs.tokenizer)


def names_of(policies: Sequence[Policy]) -> tuple[str, ...]:
    """Return the policies' ids, with the mode if a shadow and an enforced one share an id."""
    times = Counter(policy.id for policy in policies)
    return tuple(f"{p.id} ({p.mode})" if times[p.id] > 1 else p.id for p in policies)


def _sample(benign: Sequence[Dataset]) -> list[np.ndarray]:
    """Return the ordinary texts that baselines score, a mask [texts] for each dataset."""
    if not benign:
        return []
    sizes = [len(dataset) for dataset in benign]
    return np.split(baselines.spread(sum(sizes), baselines.ORDINARY), np.cumsum(sizes)[:-1])


def _sections(
    inputs: Inputs,
    judged: Sequence[tuple[Dataset, tuple[int, ...]]],
    options: Options,
    store: Store,
    of_benign: Sequence[Sequence[Verdicts]],
    sample: Sequence[np.ndarray],
) -> list[Section]:
    compared = Compared(
        inputs.lm,
        inputs.watchlist.policies,
        inputs.keys,
        store,
        tuple(zip(inputs.benign, sample, strict=True)),
    )
    sections = []
    bar = tqdm(judged, desc="measure", unit="set")
    for dataset, some in bar:
        bar.set_postfix_str(dataset.name)
        if not some:
            note = "no policy has its behaviour" if dataset.behaviour else "no policy was named"
            sections.append(Section(dataset, (), (f"not judged: {note}",)))
            continue
        rows = [_row(inputs, dataset, i, options, store, of_benign[i]) for i in some]
        detectors, notes = compare(compared, dataset, some, inputs.read_by(some), options)
        rows += [Row(d, measure(d, dataset, options.seed)) for d in detectors]
        sections.append(Section(dataset, tuple(rows), (*_notes(dataset), *notes)))
    return sections


def _notes(dataset: Dataset) -> Iterator[str]:
    positives, negatives = dataset.counts
    if not positives or not negatives:
        label = "positives" if positives else "negatives"
        yield f"{label} only: no AUROC, no pairs and no floors; only rates can be measured"


def _row(
    inputs: Inputs,
    dataset: Dataset,
    policy: int,
    options: Options,
    store: Store,
    of_benign: Sequence[Verdicts],
) -> Row:
    found = read_verdicts(store, dataset, inputs.keys.policies[policy])
    scores = [v.score[~np.isnan(v.score)] for v in of_benign]
    detector = Detector(
        names_of(inputs.watchlist.policies)[policy],
        "policy",
        part_of(inputs.watchlist.policies[policy].scope),
        found.score,
        (np.concatenate(scores) if scores else np.empty(0),),
        np.zeros(len(dataset), np.int64),
        found.match,
        "thresholds replace TopK ranks" if inputs.watchlist.rules.approximate[policy] else "",
    )
    outcomes = {
        "positives": found.counts(dataset.label),
        "negatives": found.counts(~dataset.label),
    }
    negatives, missed = choose_worst(dataset, found.score, found.match, options.worst)
    worst = [_example(dataset, found, i) for i in (*negatives, *missed)]
    figures = measure(detector, dataset, options.seed)
    figures["coverage"] = {"tokens": found.tokens, "evaluated": found.evaluated}
    kinds = tuple(by_kind(detector, dataset, options.seed))
    return Row(detector, figures, kinds, outcomes, policy, tuple(worst))


def _ordinary(benign: Sequence[Dataset], found: Sequence[Verdicts], worst: int) -> Ordinary:
    counts, rate, files = firing_rate(found, benign)
    examples = [
        _example(dataset, verdicts, i)
        for dataset, verdicts in zip(benign, found, strict=True)
        for i in choose_worst(dataset, verdicts.score, verdicts.match, worst)[0]
    ]
    examples.sort(key=lambda example: -example.score)
    scores = [v.score[~np.isnan(v.score)] for v in found]
    return Ordinary(
        np.concatenate(scores) if scores else np.empty(0),
        counts,
        rate,
        tuple(files),
        tuple(examples[:worst]),
    )


def _example(dataset: Dataset, found: Verdicts, i: int) -> Example:
    return Example(
        dataset.name,
        dataset.ids[i],
        bool(dataset.label[i]),
        str(found.outcome[i]),
        float(found.score[i]),
        str(dataset.kind[i]),
    )
