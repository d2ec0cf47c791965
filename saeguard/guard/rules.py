"""Judge one whole text: from feature shares to one verdict per policy.

The semantics, which serving follows token by token:

- Evidence `e[t]` of a policy is that of its condition (`saeguard.guard.evidence`) where position
  `t` is in scope and was evaluated, and -inf elsewhere.
- Its score at `t` is the k-th largest evidence among positions `(t - n, t]` for `for: k of n`.
- It matches at `t` where that score exceeds 1, and stays on for `keep` further positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, get_args

import numpy as np

from saeguard.guard.evidence import evidence
from saeguard.guard.verdict import THRESHOLD, Coverage, Fired, Outcome, Reason, Verdict
from saeguard.policy.types import Policy

if TYPE_CHECKING:
    from saeguard.guard.watchlist import WatchList  # imports torch, which policy tests do without

REASONS: tuple[Reason, ...] = get_args(Reason)


def in_scope(policy: Policy, positions: np.ndarray, prompt_tokens: int) -> np.ndarray:
    """Return which of the token `positions` [tokens] the policy looks at."""
    if policy.scope == "both":
        return np.ones(len(positions), bool)
    is_prompt: np.ndarray = positions < prompt_tokens
    return is_prompt if policy.scope == "prompt" else ~is_prompt


def window_score(evidence: np.ndarray, k: int, n: int) -> np.ndarray:
    """Return the k-th largest of the last `n` values at each position.

    Args:
        evidence: [tokens] or [tokens, policies] float64, -inf where nothing was evaluated.
        k: how many must hold.
        n: among how many.
    """
    if n == 1:
        return evidence
    pad = np.full((n - 1, *evidence.shape[1:]), -np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(np.concatenate([pad, evidence]), n, axis=0)
    kth: np.ndarray = np.partition(windows, n - k, axis=-1)[..., n - k]
    return kth


def on_tokens(match: np.ndarray, keep: int) -> np.ndarray:
    """Return where the policy is on: a match within the last `keep` tokens or here."""
    last = np.where(match, np.arange(len(match)), -keep - 1)
    on: np.ndarray = np.arange(len(match)) - np.maximum.accumulate(last) <= keep
    return on


def judge(
    policy: Policy,
    shares: Mapping[str, np.ndarray],
    prompt_tokens: int,
    evaluable: np.ndarray | None = None,
) -> Verdict:
    """Judge one policy on traces of feature shares, one value per token.

    Args:
        policy: what to judge by.
        shares: per feature [tokens].
        prompt_tokens: how many of the tokens are the prompt.
        evaluable: [tokens] bool; tokens left out count as special ones. Default: all of them.
    """
    tokens = len(next(iter(shares.values())))
    evaluable = np.ones(tokens, bool) if evaluable is None else evaluable
    skipped = int((~evaluable & in_scope(policy, np.arange(tokens), prompt_tokens)).sum())
    traces = {name: np.asarray(shares[s.feature], np.float64) for name, s in policy.detect.items()}
    e = evidence(
        policy.condition, {name: t / policy.detect[name].above for name, t in traces.items()}, np
    )
    reasons: Mapping[Reason, int] = {"special_token": skipped} if skipped else {}
    return _verdict(policy, e, traces, evaluable, prompt_tokens, reasons)


def judge_all(
    watchlist: WatchList,
    shares: np.ndarray,
    evaluable: np.ndarray,
    prompt_tokens: int,
    reason: Reason = "special_token",
) -> list[Verdict]:
    """Judge every policy of the watch list on one text.

    Args:
        watchlist: the compiled policies.
        shares: [tokens, features] float32.
        evaluable: [tokens] bool; tokens left out count as skipped for `reason`.
        prompt_tokens: how many of the tokens are the prompt.
        reason: why tokens were left out.
    """
    e = watchlist.evidence(shares)
    out = []
    for i, policy in enumerate(watchlist.policies):
        traces = {
            name: shares[:, watchlist.selection_feature[j]]
            for name, j in watchlist.policy_selections[i].items()
        }
        skipped = ~evaluable & in_scope(policy, np.arange(len(shares)), prompt_tokens)
        reasons = {reason: int(skipped.sum())} if skipped.any() else {}
        out.append(_verdict(policy, e[:, i], traces, evaluable, prompt_tokens, reasons))
    return out


def _verdict(
    policy: Policy,
    e: np.ndarray,
    traces: Mapping[str, np.ndarray],
    evaluable: np.ndarray,
    prompt_tokens: int,
    skipped: Mapping[Reason, int],
) -> Verdict:
    scope = in_scope(policy, np.arange(len(e)), prompt_tokens)
    looked = scope & evaluable
    broken = looked & ~np.isfinite(np.stack(list(traces.values()))).all(axis=0)
    scores = window_score(np.where(looked & ~broken, e, -np.inf), policy.window.k, policy.window.n)
    match = scores > THRESHOLD
    if broken.any():
        skipped = {**skipped, "error": int(broken.sum())}
    evaluated = int(looked.sum()) - int(broken.sum())
    matched = bool(match.any())
    return Verdict(
        policy=policy.id,
        digest=policy.digest,
        mode=policy.mode,
        action=policy.action,
        severity=policy.severity,
        outcome=outcome(matched=matched, error=bool(broken.any()), evaluated=evaluated),
        score=float(scores.max()) if np.isfinite(scores).any() else None,
        first_token=int(match.argmax()) if matched else None,
        matched_tokens=int(on_tokens(match, policy.keep).sum()),
        acted=policy.action if matched and policy.mode == "enforce" else None,
        features=_fired(policy, traces, looked & ~broken),
        coverage=Coverage(int(scope.sum()), evaluated, skipped),
        error="non_finite_activation" if broken.any() else None,
    )


def outcome(*, matched: bool, error: bool, evaluated: int) -> Outcome:
    """Fold nothing into `no_match`: a match stands, else an error, else whether it looked."""
    if matched:
        return "match"
    if error:
        return "error"
    return "no_match" if evaluated else "not_evaluated"


def _fired(
    policy: Policy, traces: Mapping[str, np.ndarray], looked: np.ndarray
) -> dict[str, Fired]:
    fired: dict[str, Fired] = {}
    for name, selection in policy.detect.items():
        # float64, as evidence is: NumPy would round the threshold to the trace's own float32.
        trace = np.where(looked, traces[name].astype(np.float64), -np.inf)
        at = int(trace.argmax()) if len(trace) else 0
        if looked.any():
            count = int((trace > selection.above).sum())
            other = fired.get(selection.feature)
            if other is None or count > other.count:  # of two thresholds, the lower one counts
                fired[selection.feature] = Fired(count, float(trace[at]), at)
    return fired


def strongest(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Return the acting verdicts of the strongest action; more than one is a tie."""
    order = {"log": 0, "flag": 1, "clamp": 2, "stop": 3}
    acting = [v for v in verdicts if v.acted is not None]
    top = max((order[v.acted] for v in acting if v.acted), default=-1)
    return [v for v in acting if v.acted and order[v.acted] == top]
