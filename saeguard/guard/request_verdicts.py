"""Build the verdicts of one request, and their coverage, from its state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import isfinite
from typing import get_args, overload

import numpy as np

from saeguard.guard.compiled_rules import Rules
from saeguard.guard.evaluate import (
    CACHED,
    ERROR,
    EVALUATED,
    MASSIVE,
    SPECIAL,
    UNTRACKED,
    roles_at,
)
from saeguard.guard.scopes import MEMBERS, ROLES
from saeguard.guard.state import State
from saeguard.guard.verdict import THRESHOLD, Coverage, Fired, Outcome, Reason, Verdict, balanced

OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
_REASONS: dict[int, Reason] = {
    SPECIAL: "special_token",
    MASSIVE: "massive_norm",
    CACHED: "prefix_cached",
    ERROR: "error",
    UNTRACKED: "untracked",
}


_MEMBERS = [np.flatnonzero(looks).tolist() for looks in MEMBERS.T]
"""By scope: the roles that it looks at."""


def coverages(s: State, slot: int, tokens: int) -> list[Coverage]:
    """Return the coverage of each role of a request of `tokens` tokens, in the order of `ROLES`."""
    after = min(int(s.next[slot]), tokens)
    whole, left = (_count(s, slot, first, tokens) for first in (0, after))
    # The last token is never forwarded; other missing tokens were cut off by an abort.
    last = _count(s, slot, max(after, tokens - 1), tokens)
    found = []
    for role, counts in enumerate(s.counts[slot].tolist()):
        skipped: dict[Reason, int] = {
            reason: counts[what] for what, reason in _REASONS.items() if counts[what]
        }
        if last[role]:
            skipped["not_forwarded"] = last[role]
        if left[role] - last[role]:
            skipped["aborted"] = left[role] - last[role]
        found.append(Coverage(whole[role], counts[EVALUATED], skipped))
    return found


def _count(s: State, slot: int, first: int, end: int) -> list[int]:
    """Return the number of tokens of each role at positions `first` to `end - 1`."""
    if first >= end:
        return [0] * len(ROLES)
    role = roles_at(s, np.array([slot]), np.arange(first, end)[None])
    counts: list[int] = np.bincount(role[0], minlength=len(ROLES)).tolist()
    return counts


def add(parts: Sequence[Coverage]) -> Coverage:
    """Return the sum of several coverages."""
    skipped: dict[Reason, int] = {}
    for part in parts:
        for reason, n in part.skipped.items():
            skipped[reason] = skipped.get(reason, 0) + n
    return Coverage(sum(p.tokens for p in parts), sum(p.evaluated for p in parts), skipped)


@dataclass(frozen=True, slots=True, eq=False)
class Verdicts(Sequence[Verdict]):
    """The verdicts of one request, held as arrays; each `Verdict` is built when it is read.

    A request has a verdict of each policy, and there may be thousands of policies. Only the event
    log reads most of these verdicts.
    """

    rules: Rules
    which: np.ndarray
    """[n] the policies that apply to the request, in the order of the verdicts."""
    outcome: np.ndarray
    """[P] index into `OUTCOMES`."""
    acts: np.ndarray
    """[P] bool: the policy's action was taken."""
    enforced: np.ndarray
    """[P] bool."""
    sampled: np.ndarray
    """[P] bool."""
    score: np.ndarray
    """[P] highest score; not finite if no token was evaluated."""
    first: np.ndarray
    """[P] position of the first match, -1 without one."""
    matched: np.ndarray
    """[P] number of tokens on which the policy was on."""
    fired: np.ndarray
    """[Q] tokens above the threshold of each term; `peak` and `peak_at` are by term too."""
    peak: np.ndarray
    peak_at: np.ndarray
    coverages: tuple[Coverage, ...]
    """By scope; then by scope again, for policies whose sample leaves the request out."""
    waived: Mapping[int, str] = field(default_factory=dict)
    """By policy: id of the exception that waived its action."""

    def __len__(self) -> int:
        """Return the number of verdicts."""
        return len(self.which)

    @overload
    def __getitem__(self, at: int) -> Verdict: ...
    @overload
    def __getitem__(self, at: slice) -> list[Verdict]: ...
    def __getitem__(self, at: int | slice) -> Verdict | list[Verdict]:
        """Build one verdict, or several."""
        if isinstance(at, slice):
            return [self.of_policy(i) for i in self.which[at].tolist()]
        return self.of_policy(int(self.which[at]))

    def __iter__(self) -> Iterator[Verdict]:
        """Build all verdicts, one after the other."""
        # Reading a number from a list takes a tenth of the time of reading it from an array.
        arrays = {f.name: getattr(self, f.name) for f in fields(self)}
        lists = {k: a.tolist() for k, a in arrays.items() if isinstance(a, np.ndarray)}
        return map(replace(self, **lists).of_policy, lists["which"])

    def __eq__(self, other: object) -> bool:
        """Compare with any sequence of verdicts."""
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def acting(self) -> list[Verdict]:
        """Return the verdicts whose action was taken."""
        return [self.of_policy(i) for i in self.which[self.acts[self.which]].tolist()]

    def errors(self) -> int:
        """Return the number of verdicts that are errors."""
        return int((self.outcome[self.which] == OUTCOMES.index("error")).sum())

    def balanced(self) -> bool:
        """Return whether evaluated and skipped tokens add up in every verdict."""
        return all(map(balanced, self.coverages))

    def tally(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the policies that have verdicts, and for each its `events.metrics.KINDS` index."""
        enforced = self.enforced.copy()
        enforced[list(self.waived)] = True
        return self.which, (len(OUTCOMES) * enforced + self.outcome)[self.which]

    def decided(self, applies: Sequence[bool], waived: Mapping[int, str]) -> Verdicts:
        """Return the verdicts of the applicable policies, with exceptions that waive actions."""
        return replace(self, which=np.flatnonzero(applies), waived=waived)

    def of_policy(self, i: int) -> Verdict:
        """Build the verdict of policy `i`."""
        policy = self.rules.policies[i]
        matched = bool(self.first[i] >= 0)
        acts, sampled = bool(self.acts[i]), bool(self.sampled[i])
        coverage = self.coverages[self.rules.scope[i] + (0 if sampled else len(_MEMBERS))]
        enforced = bool(self.enforced[i]) or i in self.waived
        return Verdict(
            policy=policy.id,
            digest=policy.digest,
            mode="enforce" if enforced else "shadow",
            action=policy.action,
            severity=policy.severity,
            outcome=OUTCOMES[self.outcome[i]],
            score=float(self.score[i]) if isfinite(self.score[i]) else None,
            first_token=int(self.first[i]) if matched else None,
            matched_tokens=int(self.matched[i]),
            acted=policy.action if acts else None,
            features=self._features(i) if sampled else {},
            coverage=coverage,
            exception=self.waived.get(i),
            error="not_read" if coverage.skipped.get("error") else None,
            approximate=self.rules.approximate[i],
            message=policy.message if acts and policy.action == "stop" else None,
        )

    def _features(self, i: int) -> dict[str, Fired]:
        """Return each feature's activity, by the selection of it that fired on most tokens."""
        fired: dict[str, Fired] = {}
        selections = self.rules.policies[i].detect.values()
        for selection, q in zip(selections, self.rules.terms.of_policy(i), strict=True):
            count, at = int(self.fired[q]), int(self.peak_at[q])
            before = fired.get(selection.feature)
            if at >= 0 and (before is None or before.count < count):
                fired[selection.feature] = Fired(count, float(self.peak[q]), at)
        return fired


def verdicts_of(rules: Rules, s: State, slot: int, tokens: int) -> Verdicts:
    """Return the verdict of each policy on the request in `slot`.

    Args:
        rules: the compiled policies.
        s: the state.
        slot: of the request.
        tokens: prompt and output tokens; those never forwarded count as not evaluated.
    """
    of_place = coverages(s, slot, tokens)
    looked = [add([of_place[i] for i in members]) for members in _MEMBERS]
    by_scope = (*looked, *(Coverage(c.tokens, 0, _all(c.tokens)) for c in looked))
    sampled, enforced, first = s.sampled[slot].copy(), s.enforced[slot].copy(), s.first[slot].copy()
    held, ends = s.matched[slot].copy(), rules.last.policy
    at_end = (s.score[slot, ends] > THRESHOLD) & (s.last[slot] >= 0)
    first[ends] = np.where(at_end, s.last[slot], -1)
    held[ends] = at_end
    which = rules.scope + np.where(sampled, 0, len(looked))
    matched = first >= 0
    without = np.array(
        [
            OUTCOMES.index(
                "error"
                if c.skipped.get("error")
                else "no_match"
                if c.evaluated
                else "not_evaluated"
            )
            for c in by_scope
        ]
    )
    return Verdicts(
        rules=rules,
        which=np.arange(len(rules.policies)),
        outcome=np.where(matched, OUTCOMES.index("match"), without[which]),
        acts=matched & enforced & (s.acted[slot] | ~rules.clamps),
        enforced=enforced,
        sampled=sampled,
        score=s.score[slot].copy(),
        first=first,
        matched=held,
        fired=s.fired[slot].copy(),
        peak=s.peak[slot].copy(),
        peak_at=s.peak_at[slot].copy(),
        coverages=by_scope,
    )


def _all(tokens: int) -> dict[Reason, int]:
    return {"not_sampled": tokens} if tokens else {}
