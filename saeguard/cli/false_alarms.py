"""How often policies match ordinary texts, on which every match is a false alarm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from saeguard.cli.inputs import judge_corpus, judgeable, open_corpus
from saeguard.cli.options import ModelOptions
from saeguard.policy.types import Policy
from saeguard.yaml_files.findings import Finding

if TYPE_CHECKING:
    from saeguard.cli.feature_folder import FeatureSets

SHOWN = 5
"""A message names at most so many texts."""


@dataclass(frozen=True, slots=True)
class Alarm:
    """How often one policy matches ordinary texts."""

    policy: Policy
    texts: tuple[str, ...]
    """Ids of the texts that it matches."""
    trials: int
    rate: float
    interval: tuple[float, float]
    """95 %, exact (Clopper and Pearson 1934)."""

    def finding(self, budget: float) -> Finding:
        """Return the finding that the rate is above the budget."""
        named = ", ".join(self.texts[:SHOWN]) + (", ..." if len(self.texts) > SHOWN else "")
        message = (
            f"matches {len(self.texts)} of {self.trials} ordinary texts ({self.rate:.2%}), the "
            f"budget is {budget:.2%}; raise its thresholds, or look at: {named}"
        )
        return Finding(self.policy.path, 0, 0, "test-failed", message)


def alarms(
    policies: Sequence[Policy],
    sets: FeatureSets,
    corpus: Path,
    model: Path | None,
    feature_sets: Path,
    options: ModelOptions = ModelOptions(),  # noqa: B008 - immutable
) -> list[Alarm]:
    """Judge ordinary texts by every calibrated policy, and return the rate of each."""
    ready, _ = judgeable(policies, sets)
    recording = open_corpus(corpus, ready, model, feature_sets, options)
    verdicts = judge_corpus(ready, sets, recording)
    found = []
    for i, policy in enumerate(ready):
        texts = tuple(
            id_
            for id_, of_text in zip(recording.ids, verdicts, strict=True)
            if of_text[i].outcome == "match"
        )
        found.append(Alarm(policy, texts, len(recording.ids), *rate(len(texts), len(verdicts))))
    return found


def rate(hits: int, trials: int) -> tuple[float, tuple[float, float]]:
    """Return a rate with its exact 95 % interval."""
    from saeguard.features import stats

    low, high = stats.interval(hits, trials)
    return hits / trials, (low, high)
