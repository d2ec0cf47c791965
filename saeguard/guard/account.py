"""A verdict with everything it was reached from, token by token: what `explain` tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from saeguard.features.recording import Recording
from saeguard.features.schema import Document
from saeguard.guard.evidence import evidence
from saeguard.guard.rules import in_scope, judge, on_tokens, window_score
from saeguard.guard.verdict import THRESHOLD, Verdict
from saeguard.policy.types import Policy


@dataclass(frozen=True, slots=True)
class Account:
    """How one policy came to its verdict on one text."""

    policy: Policy
    verdict: Verdict
    prompt_tokens: int
    looked: np.ndarray
    """[tokens] bool: in scope and evaluated."""
    shares: Mapping[str, np.ndarray]
    """Per selection the share it compares, [tokens] float64."""
    evidence: np.ndarray
    """[tokens] the condition's evidence; it holds where this is above 1, -inf where not looked."""
    score: np.ndarray
    """[tokens] the evidence that the window makes of it."""
    match: np.ndarray
    """[tokens] bool."""
    on: np.ndarray
    """[tokens] bool: a match, or kept on after one."""


def judge_recorded(
    policies: Sequence[Policy],
    feature_sets: Mapping[str, Document],
    recording: Recording,
    text: int,
) -> list[Verdict]:
    """Judge one recorded text by every policy.

    Args:
        policies: what to judge by; each one's feature set is among `feature_sets`.
        feature_sets: by the name that policies use, as they are today.
        recording: what the model showed.
        text: index of the text.

    Raises:
        RecordingError: a feature was not recorded, or was made of something else.
    """
    here, prompt_tokens = recording.span(text), int(recording.prompt_tokens[text])
    return [
        judge(policy, shares, prompt_tokens, recording.evaluable[here])
        for policy, shares in (
            (policy, shares_of(policy, feature_sets, recording, here)) for policy in policies
        )
    ]


def shares_of(
    policy: Policy, feature_sets: Mapping[str, Document], recording: Recording, here: slice
) -> dict[str, np.ndarray]:
    """Return the shares of every feature the policy reads, at the tokens `here`.

    Raises:
        RecordingError: a feature was not recorded, or was made of something else.
    """
    features = dict.fromkeys(s.feature for s in policy.detect.values())
    document = feature_sets[policy.feature_set]
    return {name: recording.shares(document, name, here) for name in features}


def account(
    policy: Policy, shares: Mapping[str, np.ndarray], prompt_tokens: int, evaluable: np.ndarray
) -> Account:
    """Judge one text and keep what the verdict was reached from.

    Args:
        policy: what to judge by.
        shares: per feature [tokens].
        prompt_tokens: how many of the tokens are the prompt.
        evaluable: [tokens] bool.
    """
    traces = {name: np.asarray(shares[s.feature], np.float64) for name, s in policy.detect.items()}
    ratios = {name: trace / policy.detect[name].above for name, trace in traces.items()}
    looked = in_scope(policy, np.arange(len(evaluable)), prompt_tokens) & evaluable
    looked &= np.isfinite(np.stack(list(traces.values()))).all(axis=0)
    e = np.where(looked, evidence(policy.condition, ratios, np), -np.inf)
    score = window_score(e, policy.window.k, policy.window.n)
    match = score > THRESHOLD
    return Account(
        policy=policy,
        verdict=judge(policy, shares, prompt_tokens, evaluable),
        prompt_tokens=prompt_tokens,
        looked=looked,
        shares=traces,
        evidence=e,
        score=score,
        match=match,
        on=on_tokens(match, policy.keep),
    )
