"""Judge recorded texts, and keep the arrays behind each verdict, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from saeguard.features.schema import FeatureSetFile
from saeguard.guard.compiled_rules import Rules, compile_rules
from saeguard.guard.judge import alone, judge_text, on_tokens, score_text
from saeguard.guard.scopes import BY_ROLE, OF_OUTPUT
from saeguard.guard.verdict import THRESHOLD, Verdict
from saeguard.policy.types import Policy
from saeguard.policy_tools.recording import Recording


@dataclass(frozen=True, slots=True)
class Explanation:
    """How one policy came to its verdict on one text."""

    policy: Policy
    verdict: Verdict
    prompt_tokens: int
    looked: np.ndarray
    """[tokens] bool: in scope and evaluated."""
    values: Mapping[str, np.ndarray]
    """Per selection what it compares with its threshold, [tokens] float64."""
    evidence: np.ndarray
    """[tokens] the condition's evidence; it holds if above 1; -inf if not looked at."""
    score: np.ndarray
    """[tokens] the evidence that the window makes of it."""
    match: np.ndarray
    """[tokens] bool."""
    on: np.ndarray
    """[tokens] bool: a match, or kept on after one."""


def judge_recorded(
    policies: Sequence[Policy],
    feature_sets: Mapping[str, FeatureSetFile],
    recording: Recording,
    texts: Sequence[int],
) -> Iterator[Sequence[Verdict]]:
    """Yield one verdict per policy for each of the recorded `texts`.

    Args:
        policies: what to judge by; each one's feature set is among `feature_sets`.
        feature_sets: by the name that policies use, as they are today.
        recording: what the model showed.
        texts: indices into it.

    Raises:
        RecordingError: a feature was not recorded, or was made of something else; or a policy's
            scope is a role, and roles were not recorded.
    """
    shares, column = _shares(policies, feature_sets, recording)
    rules = compile_rules(policies, column)
    for text in texts:
        here, prompt_tokens = recording.span(text), int(recording.prompt_tokens[text])
        roles = _roles(rules, recording, text)
        evaluable = recording.evaluable[here]
        massive = None if recording.massive is None else recording.massive[here]
        yield judge_text(rules, shares[here], evaluable, prompt_tokens, roles, massive)


def explain(
    policy: Policy, feature_sets: Mapping[str, FeatureSetFile], recording: Recording, text: int
) -> Explanation:
    """Judge one recorded text and keep what the verdict was reached from.

    Raises:
        RecordingError: as `explain_all`.
    """
    return next(iter(explain_all(policy, feature_sets, recording, [text])))


def explain_all(
    policy: Policy,
    feature_sets: Mapping[str, FeatureSetFile],
    recording: Recording,
    texts: Sequence[int],
) -> Iterator[Explanation]:
    """Judge recorded texts, one after the other, and keep what each verdict was reached from.

    Raises:
        RecordingError: a feature was not recorded, or was made of something else; or a policy's
            scope is a role, and roles were not recorded.
    """
    shares, column = _shares([policy], feature_sets, recording)
    rules = compile_rules([policy], column)
    for text in texts:
        here, prompt_tokens = recording.span(text), int(recording.prompt_tokens[text])
        roles = _roles(rules, recording, text)
        massive = None if recording.massive is None else recording.massive[here]
        evaluable = recording.evaluable[here]
        yield _explained(rules, shares[here], evaluable, prompt_tokens, roles, massive)


def explain_trace(
    policy: Policy,
    shares: Mapping[str, np.ndarray],
    prompt_tokens: int,
    roles: np.ndarray | None = None,
) -> Explanation:
    """Judge one policy on the shares of its features, one value per token, all tokens evaluated."""
    rules, traces = alone(policy, shares)
    return _explained(rules, traces, np.ones(len(traces), bool), prompt_tokens, roles, None)


def _explained(
    rules: Rules,
    shares: np.ndarray,
    evaluable: np.ndarray,
    prompt_tokens: int,
    roles: np.ndarray | None,
    massive: np.ndarray | None,
) -> Explanation:
    """Judge one text by the rules of one policy; for the arguments see `judge_text`."""
    [policy] = rules.policies
    given = (rules, shares, evaluable, prompt_tokens, roles, massive)
    scored = score_text(*given)
    traces = dict(
        zip(policy.detect, rules.tables.terms[list(rules.terms[0])]["trace"], strict=True)
    )
    score = scored.score[:, 0]
    if policy.window.last:
        seen = np.flatnonzero(score > -np.inf)
        score = np.where(np.isin(np.arange(len(score)), seen[-1:]), score, -np.inf)
    match = score > THRESHOLD
    return Explanation(
        policy=policy,
        verdict=judge_text(*given)[0],
        prompt_tokens=prompt_tokens,
        looked=scored.looked[:, rules.scope[0]],
        values={name: scored.values[:, trace] for name, trace in traces.items()},
        evidence=scored.evidence[:, 0],
        score=score,
        match=match,
        on=on_tokens(match, policy.keep),
    )


def _roles(rules: Rules, recording: Recording, text: int) -> np.ndarray | None:
    """Return the role of each token of a text's prompt, None if no policy needs it."""
    asks = next((policy for policy in rules.policies if policy.scope in BY_ROLE), None)
    if asks is None and recording.roles is not None:
        asks = next((policy for policy in rules.policies if policy.scope in OF_OUTPUT), None)
    return None if asks is None else recording.roles_of_prompt(text, asks)


def _shares(
    policies: Sequence[Policy], feature_sets: Mapping[str, FeatureSetFile], recording: Recording
) -> tuple[np.ndarray, dict[str, int]]:
    """Return the shares [T, features] of every feature the policies read, and their columns."""
    wanted = dict.fromkeys(
        (policy.feature_set, selection.feature)
        for policy in policies
        for selection in policy.detect.values()
    )
    everywhere = slice(None)
    columns = [recording.shares(feature_sets[s], name, everywhere) for s, name in wanted]
    shares = np.stack(columns, axis=1) if columns else np.empty((len(recording.evaluable), 0))
    return shares, {f"{set_}/{name}": i for i, (set_, name) in enumerate(wanted)}
