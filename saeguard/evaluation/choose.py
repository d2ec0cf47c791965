"""Which policies are judged on which datasets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from saeguard.evaluation.datasets import Dataset, EvaluationError, Part
from saeguard.features.types import FeatureSet
from saeguard.policy.types import Policy, Scope


def part_of(scope: Scope) -> Part:
    """Return the part of a text that a policy of this scope reads."""
    if scope == "both":
        return "both"
    return "output" if scope in {"output", "assistant"} else "prompt"


def behaviours_of(policy: Policy, sets: Mapping[str, FeatureSet]) -> set[str]:
    """Return the behaviours of a policy's features, in one spelling."""
    features = sets[policy.feature_set].features
    return {plain(features[s.feature].behaviour) for s in policy.detect.values()}


def plain(behaviour: str) -> str:
    """Return a behaviour in the spelling by which datasets and features are compared."""
    return "_".join(behaviour.casefold().replace("-", " ").replace("_", " ").split())


def parse_pair(text: str) -> tuple[str, str]:
    """Split `POLICY=DATASET`.

    Raises:
        EvaluationError: one of the two is missing.
    """
    policy, equals, dataset = text.partition("=")
    if not (equals and policy and dataset):
        raise EvaluationError(
            f"--pair: found {text!r}, expected POLICY=DATASET, such as unsafe-code.*=securityeval"
        )
    return policy, dataset


def choose_pairs(
    policies: Sequence[Policy],
    sets: Mapping[str, FeatureSet],
    datasets: Sequence[Dataset],
    named: Sequence[tuple[str, str]] = (),
    *,
    every: bool = False,
) -> list[tuple[int, int]]:
    """Return the indices of the policies and datasets that go together, by dataset.

    Args:
        policies: to be judged.
        sets: their feature sets.
        datasets: to judge them on.
        named: patterns of a policy's id and a dataset's name. A policy that one of them names is
            judged on the datasets that they give it, any other on those of its behaviour.
        every: judge each policy on each dataset.

    Raises:
        EvaluationError: a pattern names no policy or no dataset, or nothing goes together.
    """
    for of_policy, of_dataset in named:
        _known("policy", of_policy, [p.id for p in policies])
        _known("dataset", of_dataset, [d.name for d in datasets])
    pairs = []
    for j, dataset in enumerate(datasets):
        for i, policy in enumerate(policies):
            mine = [d for p, d in named if fnmatchcase(policy.id, p)]
            if every:
                fits = True
            elif mine:
                fits = any(fnmatchcase(dataset.name, pattern) for pattern in mine)
            else:
                fits = plain(dataset.behaviour) in behaviours_of(policy, sets)
            if fits:
                pairs.append((i, j))
    if datasets and not pairs:
        wanted = sorted({b for p in policies for b in behaviours_of(p, sets)})
        found = sorted({d.behaviour or "none" for d in datasets})
        raise EvaluationError(
            f"no dataset has the behaviour of a policy: the policies' features have "
            f"{', '.join(wanted)}; the datasets' lines have {', '.join(found)}; name pairs with "
            "--pair POLICY=DATASET, or judge every policy on every dataset with --all"
        )
    return pairs


def _known(what: str, pattern: str, names: Sequence[str]) -> None:
    if not any(fnmatchcase(name, pattern) for name in names):
        raise EvaluationError(
            f"--pair: no {what} is named {pattern!r}; there are: {', '.join(sorted(names))}"
        )
