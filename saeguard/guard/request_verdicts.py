"""Build the verdicts of one request, and their coverage, from its state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import isfinite
from typing import get_args, overload

import numpy as np

from saeguard.guard.compiled_rules import Rules
from saeguard.guard.evaluate import CACHED, ERROR, EVALUATED, MASSIVE, SPECIAL, UNTRACKED
from saeguard.guard.scopes import MEMBERS, OUTPUT, ROLES, SCOPES, TEMPLATE
from saeguard.guard.state import FATES, State
from saeguard.guard.verdict import THRESHOLD, Coverage, Fired, Outcome, Reason, Verdict

OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
MATCH, NO_MATCH, READ_ERROR, NOT_EVALUATED = range(len(OUTCOMES))
NOT_FORWARDED, ABORTED, TOKENS = range(FATES, FATES + 3)
"""Columns of `fates_of` behind the ledger's own: two more reasons, and all tokens."""
_REASONS: tuple[tuple[int, Reason], ...] = (
    (SPECIAL, "special_token"),
    (MASSIVE, "massive_norm"),
    (CACHED, "prefix_cached"),
    (ERROR, "error"),
    (UNTRACKED, "untracked"),
    (NOT_FORWARDED, "not_forwarded"),
    (ABORTED, "aborted"),
)
_WHOLE = SCOPES.index("both")
_LOOKS = np.ascontiguousarray(MEMBERS.T.astype(np.int64))
"""[scopes, roles] 1 if the scope looks at the role."""


def fates_of(s: State, slot: int, tokens: int) -> list[list[int]]:
    """Return what became of the tokens of each scope, for a request of `tokens` tokens.

    Returns:
        [scopes][fates]: the ledger's `EVALUATED` to `MASSIVE`, then `NOT_FORWARDED` to `TOKENS`.
    """
    after = min(int(s.next[slot]), tokens)
    # The last token is never forwarded; other missing tokens were cut off by an abort.
    last = max(after, tokens - 1)
    counts = np.empty((len(ROLES), TOKENS + 1), np.int64)
    counts[:, :FATES] = s.counts[slot]
    counts[:, NOT_FORWARDED] = _count(s, slot, last, tokens)
    counts[:, ABORTED] = _count(s, slot, after, last)
    counts[:, TOKENS] = _count(s, slot, 0, tokens)
    fates: list[list[int]] = (_LOOKS @ counts).tolist()
    return fates


def _count(s: State, slot: int, first: int, end: int) -> list[int]:
    """Return the number of tokens of each role at positions `first` to `end - 1`."""
    counts = [0] * len(ROLES)
    if first >= end:
        return counts
    prompt, roles = int(s.prompt[slot]), s.roles[slot]
    asked = max(0, min(end, prompt) - first)
    if roles is None:
        counts[TEMPLATE] = asked
    elif asked:
        counts = np.bincount(roles[first : first + asked], minlength=len(ROLES)).tolist()
    counts[OUTPUT] = end - first - asked
    return counts


def coverage_of(fates: Sequence[int]) -> Coverage:
    """Return the coverage of one scope, from its row of `fates_of`."""
    skipped = {reason: fates[what] for what, reason in _REASONS if fates[what]}
    return Coverage(fates[TOKENS], fates[EVALUATED], skipped)


def whole_coverage(s: State, slot: int, tokens: int) -> Coverage:
    """Return the coverage of all tokens of a request, whatever the policies' scopes."""
    return coverage_of(fates_of(s, slot, tokens)[_WHOLE])


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
    fates: Sequence[Sequence[int]]
    """By scope: what became of its tokens, see `fates_of`."""
    base: tuple[int, ...]
    """By scope, then once more for policies whose sample leaves the request out: index into
    `OUTCOMES` of a policy that did not match."""
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

    @property
    def coverage(self) -> Coverage:
        """Return the coverage of all tokens of the request, whatever the policies' scopes."""
        return coverage_of(self.fates[_WHOLE])

    def acting(self) -> list[Verdict]:
        """Return the verdicts whose action was taken."""
        return [self.of_policy(i) for i in self._among(self.acts)]

    def matched_policies(self) -> list[int]:
        """Return the policies that match."""
        return self._among(self.first >= 0)

    def telling(self) -> list[int]:
        """Return the policies that match or could not read a token."""
        if READ_ERROR in self.base:
            return self._among((self.outcome == MATCH) | (self.outcome == READ_ERROR))
        return self.matched_policies()

    def errors(self) -> int:
        """Return the number of verdicts that are errors."""
        return len(self._among(self.outcome == READ_ERROR)) if READ_ERROR in self.base else 0

    def outcomes(self) -> dict[Outcome, int]:
        """Return the number of verdicts of each outcome that occurs."""
        counts = np.bincount(self.outcome[self.which], minlength=len(OUTCOMES)).tolist()
        return {outcome: n for outcome, n in zip(OUTCOMES, counts, strict=True) if n}

    def balanced(self) -> bool:
        """Return whether evaluated and skipped tokens add up in every verdict."""
        return all(sum(fates) == 2 * fates[TOKENS] for fates in self.fates)

    def expected_kinds(self) -> np.ndarray:
        """Return the `events.metrics.KINDS` index of each of `which`, as if none were unusual."""
        outcome = np.array(self.base)[self.rules.scope]
        kinds: np.ndarray = (len(OUTCOMES) * self._counts_as_enforced() + outcome)[self.which]
        return kinds

    def unusual(self) -> list[tuple[int, int, int]]:
        """Return each policy that matches or is not sampled, its expected and its own kind."""
        policies = self._among((self.first >= 0) | ~self.sampled)
        if not policies:
            return []
        mode = len(OUTCOMES) * self._counts_as_enforced()
        return [
            (i, int(mode[i]) + self.base[self.rules.scope[i]], int(mode[i]) + int(self.outcome[i]))
            for i in policies
        ]

    def _counts_as_enforced(self) -> np.ndarray:
        """Return [P] bool: the policy is enforced for the request, waived or not."""
        enforced = self.enforced.copy()
        enforced[list(self.waived)] = True
        return enforced

    def decided(self, which: np.ndarray, waived: Mapping[int, str]) -> Verdicts:
        """Return the verdicts of the policies `which`, with exceptions that waive actions."""
        return replace(self, which=which, waived=waived)

    def _among(self, chosen: np.ndarray) -> list[int]:
        """Return the policies of `chosen` [P] bool that have verdicts."""
        found = np.flatnonzero(chosen)
        if len(found) and len(self.which) < len(chosen):
            found = found[np.isin(found, self.which)]
        policies: list[int] = found.tolist()
        return policies

    def of_policy(self, i: int) -> Verdict:
        """Build the verdict of policy `i`."""
        policy = self.rules.policies[i]
        matched = bool(self.first[i] >= 0)
        acts, sampled = bool(self.acts[i]), bool(self.sampled[i])
        fates = self.fates[self.rules.scope[i]]
        coverage = coverage_of(fates) if sampled else _left_out(fates[TOKENS])
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
    fates = fates_of(s, slot, tokens)
    sampled, enforced, first = s.sampled[slot].copy(), s.enforced[slot].copy(), s.first[slot].copy()
    held, ends = s.matched[slot].copy(), rules.last.policy
    at_end = (s.score[slot, ends] > THRESHOLD) & (s.last[slot] >= 0)
    first[ends] = np.where(at_end, s.last[slot], -1)
    held[ends] = at_end
    matched = first >= 0
    base = (*map(_without_match, fates), *(NOT_EVALUATED for _ in fates))
    by_scope = np.array(base)
    return Verdicts(
        rules=rules,
        which=np.arange(len(rules.policies)),
        outcome=np.where(matched, MATCH, by_scope[rules.scope + len(fates) * ~sampled]),
        acts=matched & enforced & (s.acted[slot] | ~rules.clamps),
        enforced=enforced,
        sampled=sampled,
        score=s.score[slot].copy(),
        first=first,
        matched=held,
        fired=s.fired[slot].copy(),
        peak=s.peak[slot].copy(),
        peak_at=s.peak_at[slot].copy(),
        fates=fates,
        base=base,
    )


def _without_match(fates: Sequence[int]) -> int:
    """Return the outcome of a policy that did not match, as an index into `OUTCOMES`."""
    if fates[ERROR]:
        return READ_ERROR
    return NO_MATCH if fates[EVALUATED] else NOT_EVALUATED


def _left_out(tokens: int) -> Coverage:
    """Return the coverage of a policy whose sample leaves the request out."""
    return Coverage(tokens, 0, {"not_sampled": tokens} if tokens else {})
