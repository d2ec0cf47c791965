"""Build the verdicts of one request from its state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import isfinite
from typing import get_args, overload

import numpy as np

from saeguard.guard.compiled_rules import Rules
from saeguard.guard.conclude import Found, conclude
from saeguard.guard.fates import EVERYWHERE, TOKENS, coverage_of, fates_of, left_out
from saeguard.guard.state import State
from saeguard.guard.tables import ERROR, EVALUATED
from saeguard.guard.verdict import Coverage, Fired, Outcome, Verdict

OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
MATCH, NO_MATCH, READ_ERROR, NOT_EVALUATED = range(len(OUTCOMES))


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
    found: Found
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
        found = Found(*(a.tolist() for a in self.found))
        return map(replace(self, **lists, found=found).of_policy, lists["which"])

    def __eq__(self, other: object) -> bool:
        """Compare with any sequence of verdicts."""
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    @property
    def coverage(self) -> Coverage:
        """Return the coverage of all tokens of the request, whatever the policies' scopes."""
        return coverage_of(self.fates[EVERYWHERE])

    def acting(self) -> list[Verdict]:
        """Return the verdicts whose action was taken."""
        return [self.of_policy(i) for i in self._among(self.acts)]

    def matched_policies(self) -> list[int]:
        """Return the policies that match."""
        return self._among(self.found.first >= 0)

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
        policies = self._among((self.found.first >= 0) | ~self.sampled)
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
        policy, found = self.rules.policies[i], self.found
        matched = bool(found.first[i] >= 0)
        acts, sampled = bool(self.acts[i]), bool(self.sampled[i])
        fates = self.fates[self.rules.scope[i]]
        coverage = coverage_of(fates) if sampled else left_out(fates[TOKENS])
        enforced = bool(self.enforced[i]) or i in self.waived
        return Verdict(
            policy=policy.id,
            digest=policy.digest,
            mode="enforce" if enforced else "shadow",
            action=policy.action,
            severity=policy.severity,
            outcome=OUTCOMES[self.outcome[i]],
            score=float(found.score[i]) if isfinite(found.score[i]) else None,
            first_token=int(found.first[i]) if matched else None,
            matched_tokens=int(found.matched[i]),
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
        selections, found = self.rules.policies[i].detect.values(), self.found
        for selection, q in zip(selections, self.rules.terms[i], strict=True):
            count, at = int(found.fired[q]), int(found.peak_at[q])
            before = fired.get(selection.feature)
            if at >= 0 and (before is None or before.count < count):
                fired[selection.feature] = Fired(count, float(found.peak[q]), at)
        return fired


def verdicts_of(
    rules: Rules, s: State, slot: int, roles: np.ndarray | None, tokens: int
) -> Verdicts:
    """Return the verdict of each policy on the request in `slot`.

    Args:
        rules: the compiled policies.
        s: the state.
        slot: of the request.
        roles: [prompt tokens] role of each; None if no policy needs them.
        tokens: prompt and output tokens; those never forwarded count as not evaluated.
    """
    fates = fates_of(s, slot, roles, tokens)
    found = conclude(rules.tables, s, slot)
    mine = s.policies[slot]
    sampled, enforced, acted = (mine[n].astype(bool) for n in ("sampled", "enforced", "acted"))
    matched = found.first >= 0
    base = (*map(_without_match, fates), *(NOT_EVALUATED for _ in fates))
    by_scope = np.array(base)
    return Verdicts(
        rules=rules,
        which=np.arange(len(rules.policies)),
        outcome=np.where(matched, MATCH, by_scope[rules.scope + len(fates) * ~sampled]),
        acts=matched & enforced & (acted | ~rules.clamps),
        enforced=enforced,
        sampled=sampled,
        found=found,
        fates=fates,
        base=base,
    )


def _without_match(fates: Sequence[int]) -> int:
    """Return the outcome of a policy that did not match, as an index into `OUTCOMES`."""
    if fates[ERROR]:
        return READ_ERROR
    return NO_MATCH if fates[EVALUATED] else NOT_EVALUATED
