"""Rule state and coverage of the requests in flight, a few array operations a step.

The semantics are those of `saeguard.guard.rules`, advanced by what each pass brings. Requests
that bring one row (decoding) are advanced together; a request that brings several (prefill,
accepted drafts) is advanced on its own, all its tokens at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from saeguard.guard.packet import Packet
from saeguard.guard.rules import outcome
from saeguard.guard.verdict import THRESHOLD, Coverage, Fired, Reason, Verdict
from saeguard.guard.watchlist import WatchList

PROMPT, OUTPUT = 0, 1
EVALUATED, SPECIAL, CACHED, ERROR, UNTRACKED = range(5)
_REASONS: dict[int, Reason] = {
    SPECIAL: "special_token",
    CACHED: "prefix_cached",
    ERROR: "error",
    UNTRACKED: "untracked",
}


@dataclass(frozen=True, slots=True)
class Terms:
    """The selections of all policies in one row: whose, of which feature, above what."""

    policy: np.ndarray
    feature: np.ndarray
    above: np.ndarray
    name: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class State:
    """Struct of arrays over request slots; `P` policies, `Q` terms."""

    next: np.ndarray
    """[slots] the position expected next; what lies before it has been accounted for."""
    prompt: np.ndarray
    """[slots] prompt tokens."""
    counts: np.ndarray
    """[slots, prompt or output, evaluated or why not] tokens."""
    score: np.ndarray
    """[slots, P] highest window score."""
    first: np.ndarray
    """[slots, P] position of the first match, -1 before it."""
    matched: np.ndarray
    """[slots, P] tokens on which the policy was on."""
    on_until: np.ndarray
    """[slots, P] last position kept on by the latest match."""
    acted: np.ndarray
    """[slots, P] bool: a clamp edited a row."""
    enforced: np.ndarray
    """[slots, P] bool."""
    ring: np.ndarray
    """[slots, longest window, P] evidence by `position % longest window`."""
    fired: np.ndarray
    """[slots, Q] tokens above the selection's threshold."""
    peak: np.ndarray
    """[slots, Q] highest share."""
    peak_at: np.ndarray
    """[slots, Q] its position."""


def _state(slots: int, policies: int, terms: int, longest: int) -> State:
    def full(value: Any, *shape: int, dtype: Any = np.int64) -> np.ndarray:
        return np.full((slots, *shape), value, dtype)

    return State(
        next=full(0),
        prompt=full(0),
        counts=full(0, 2, 5),
        score=full(-np.inf, policies, dtype=np.float64),
        first=full(-1, policies),
        matched=full(0, policies),
        on_until=full(-1, policies),
        acted=full(False, policies, dtype=bool),
        enforced=full(False, policies, dtype=bool),
        ring=full(-np.inf, longest if longest > 1 else 0, policies, dtype=np.float64),
        fired=full(0, terms),
        peak=full(-np.inf, terms, dtype=np.float32),
        peak_at=full(-1, terms),
    )


class Ledger:
    """The requests in flight: `admit`, `ingest` what each pass saw, `finish` into verdicts."""

    def __init__(self, watchlist: WatchList, slots: int = 64) -> None:
        """Start empty; `slots` is a first guess and grows with the load."""
        self.watchlist = watchlist
        policies = watchlist.policies
        self._prompt_scope = np.array([p.scope in ("prompt", "both") for p in policies], bool)
        self._output_scope = np.array([p.scope in ("output", "both") for p in policies], bool)
        self._enforced = np.array([p.mode == "enforce" for p in policies], bool)
        self._keep = np.array([p.keep for p in policies], np.int64)
        windows = sorted({(p.window.k, p.window.n) for p in policies})
        self._windows = [
            (
                k,
                n,
                np.array([i for i, p in enumerate(policies) if (p.window.k, p.window.n) == (k, n)]),
            )
            for k, n in windows
        ]
        self._longest = max((n for _, n in windows), default=1)
        self._terms = _terms(watchlist)
        self._slot: dict[str, int] = {}
        self._free = list(range(slots))[::-1]
        self._state = _state(slots, len(policies), len(self._terms.name), self._longest)
        self._clamped = [i for clamp in watchlist.clamps for i in clamp.policies]
        self.unwatched_passes = 0

    def __contains__(self, request_id: str) -> bool:
        """Return whether the request is in flight."""
        return request_id in self._slot

    def __len__(self) -> int:
        """Return the number of requests in flight."""
        return len(self._slot)

    def admit(self, request_id: str, prompt_tokens: int, enforce: Sequence[str] = ()) -> None:
        """Start a request of which nothing has been seen.

        Args:
            request_id: the engine's own id, never the client's.
            prompt_tokens: length of its prompt.
            enforce: ids of shadow policies to enforce for it.
        """
        if not self._free:
            self._grow()
        slot = self._free.pop()
        self._slot[request_id] = slot
        s = self._state
        fresh = _state(1, len(self.watchlist.policies), len(self._terms.name), self._longest)
        for field in State.__dataclass_fields__:
            getattr(s, field)[slot] = getattr(fresh, field)[0]
        s.prompt[slot] = prompt_tokens
        s.enforced[slot] = self._enforced
        if enforce:
            s.enforced[slot] |= [p.id in enforce for p in self.watchlist.policies]

    def ingest(self, packet: Packet, valid: np.ndarray) -> list[tuple[str, int]]:
        """Advance every request by the rows of one pass.

        Args:
            packet: what the pass saw.
            valid: [requests] leading rows that count; rejected drafts lie behind them, and a
                request that is no longer of interest has 0.

        Returns:
            (request id, policy index) of each policy that matched for the first time.
        """
        if not packet.ran:
            self.unwatched_passes += 1
        slots = np.array([self._slot.get(r, -1) for r in packet.request_ids], np.int64)
        starts = packet.query_start[:-1]
        positions = packet.positions[starts]
        known = (slots >= 0) & (valid > 0)
        together = known & (valid == 1) & (positions == self._state.next[slots])
        alone = np.flatnonzero(known & ~together)
        acted = packet.acted if self._clamped else None

        with np.errstate(invalid="ignore", over="ignore"):  # non-finite rows are set apart below
            shares = self.watchlist.shares(packet.f)
            evidence = self.watchlist.evidence(shares)
        finite = np.isfinite(packet.f).all(axis=1) if packet.ran else np.zeros(len(packet.f), bool)
        new: list[tuple[str, int]] = []
        rows = starts[together]
        if len(rows):
            at = slots[together]
            matched = self._advance(
                at,
                positions[together],
                shares[rows],
                evidence[rows],
                packet.watched[rows],
                finite[rows],
            )
            if matched is not None:
                ids = np.flatnonzero(together)
                new += [(packet.request_ids[ids[i]], int(p)) for i, p in np.argwhere(matched)]
            if acted is not None:
                self._state.acted[np.ix_(at, self._clamped)] |= acted[rows]
        for i in alone:
            span = slice(starts[i], starts[i] + valid[i])
            slot = int(slots[i])
            fresh = packet.positions[span] >= self._state.next[slot]
            if fresh.any():
                matches = self._advance_one(
                    slot,
                    packet.positions[span][fresh],
                    shares[span][fresh],
                    evidence[span][fresh],
                    packet.watched[span][fresh],
                    finite[span][fresh],
                )
                new += [(packet.request_ids[i], p) for p in matches]
            if acted is not None:
                self._state.acted[slot, self._clamped] |= acted[span].any(axis=0)
        return new

    def finish(self, request_id: str, tokens: int, *, forget: bool = True) -> list[Verdict]:
        """Return one verdict per policy for a request of `tokens` tokens.

        Args:
            request_id: a request in flight.
            tokens: prompt and output tokens; those never forwarded count as not evaluated.
            forget: end the request; False gives its verdicts so far.
        """
        slot = self._slot[request_id]
        covered = [self._coverage(slot, scope, tokens) for scope in (PROMPT, OUTPUT)]
        verdicts = [self._verdict(slot, i, covered) for i in range(len(self.watchlist.policies))]
        if forget:
            del self._slot[request_id]
            self._free.append(slot)
        return verdicts

    def coverage(self, request_id: str, tokens: int) -> Coverage:
        """Return the request's own ledger, whatever the policies' scopes."""
        slot = self._slot[request_id]
        return _add([self._coverage(slot, scope, tokens) for scope in (PROMPT, OUTPUT)])

    def _grow(self) -> None:
        s = self._state
        slots = len(s.next)
        more = _state(slots, len(self.watchlist.policies), len(self._terms.name), self._longest)
        self._state = State(
            *(np.concatenate([getattr(s, f), getattr(more, f)]) for f in State.__dataclass_fields__)
        )
        self._free = list(range(slots, 2 * slots))[::-1]

    def _looked(self, is_prompt: np.ndarray, usable: np.ndarray) -> np.ndarray:
        """Return [tokens, policies]: in the policy's scope, and evaluated."""
        scope = np.where(is_prompt[:, None], self._prompt_scope, self._output_scope)
        looked: np.ndarray = scope & usable[:, None]
        return looked

    def _advance(
        self,
        at: np.ndarray,
        position: np.ndarray,
        shares: np.ndarray,
        evidence: np.ndarray,
        watched: np.ndarray,
        finite: np.ndarray,
    ) -> np.ndarray | None:
        """Advance distinct slots `at` by one token each; return where a first match came."""
        s = self._state
        is_prompt = position < s.prompt[at]
        looked = self._looked(is_prompt, watched & finite)
        e = np.where(looked, evidence, -np.inf)
        score = self._window_scores(at, position, e)
        s.next[at] = position + 1
        what = np.where(watched, np.where(finite, EVALUATED, ERROR), SPECIAL)
        s.counts[at, np.where(is_prompt, PROMPT, OUTPUT), what] += 1
        s.score[at] = np.maximum(s.score[at], score)

        t = self._terms
        trace = np.where(looked[:, t.policy], shares[:, t.feature], -np.inf)
        above = trace > t.above
        if above.any():
            s.fired[at] += above
        peak = s.peak[at]
        higher = trace > peak
        if higher.any():  # seldom, once a request has some tokens
            s.peak[at] = np.where(higher, trace, peak)
            s.peak_at[at] = np.where(higher, position[:, None], s.peak_at[at])

        match = score > THRESHOLD
        on_until = s.on_until[at]
        if not match.any() and not (on_until >= position[:, None]).any():
            return None
        on_until = np.where(match, position[:, None] + self._keep, on_until)
        s.on_until[at] = on_until
        s.matched[at] += on_until >= position[:, None]
        first = match & (s.first[at] < 0)
        s.first[at] = np.where(first, position[:, None], s.first[at])
        return first if first.any() else None

    def _window_scores(self, at: np.ndarray, position: np.ndarray, e: np.ndarray) -> np.ndarray:
        if self._longest == 1:
            return e
        ring = self._state.ring
        ring[at, position % self._longest] = e
        back = (position[:, None] - np.arange(self._longest)) % self._longest
        window = ring[at[:, None], back]
        score = np.empty_like(e)
        for k, n, policies in self._windows:
            kth = np.partition(window[:, :n][:, :, policies], n - k, axis=1)[:, n - k]
            score[:, policies] = kth
        return score

    def _advance_one(
        self,
        slot: int,
        position: np.ndarray,
        shares: np.ndarray,
        evidence: np.ndarray,
        watched: np.ndarray,
        finite: np.ndarray,
    ) -> list[int]:
        """Advance one slot by consecutive tokens; return the policies that first matched."""
        s = self._state
        self._skip(slot, int(position[0]))
        is_prompt = position < s.prompt[slot]
        looked = self._looked(is_prompt, watched & finite)
        e = np.where(looked, evidence, -np.inf)
        what = np.where(watched, np.where(finite, EVALUATED, ERROR), SPECIAL)
        np.add.at(s.counts[slot], (np.where(is_prompt, PROMPT, OUTPUT), what), 1)

        history = self._longest - 1
        if history:
            back = np.arange(position[0] - history, position[0]) % self._longest
            padded = np.concatenate([s.ring[slot, back], e])
            s.ring[slot, position[-self._longest :] % self._longest] = e[-self._longest :]
        else:
            padded = e
        score = np.empty_like(e)
        for k, n, policies in self._windows:
            windows = np.lib.stride_tricks.sliding_window_view(
                padded[history - n + 1 :, policies], n, axis=0
            )
            score[:, policies] = np.partition(windows, n - k, axis=-1)[..., n - k]
        s.score[slot] = np.maximum(s.score[slot], score.max(axis=0))
        s.next[slot] = position[-1] + 1

        t = self._terms
        trace = np.where(looked[:, t.policy], shares[:, t.feature], -np.inf)
        s.fired[slot] += (trace > t.above).sum(axis=0)
        top = trace.argmax(axis=0)
        peak = trace[top, np.arange(len(top))]
        higher = peak > s.peak[slot]
        s.peak[slot] = np.where(higher, peak, s.peak[slot])
        s.peak_at[slot] = np.where(higher, position[top], s.peak_at[slot])

        match = score > THRESHOLD
        last = np.where(match, position[:, None] + self._keep, -1)
        last = np.maximum.accumulate(np.concatenate([s.on_until[slot][None], last]))[1:]
        s.on_until[slot] = last[-1]
        s.matched[slot] += (last >= position[:, None]).sum(axis=0)
        first = np.flatnonzero(match.any(axis=0) & (s.first[slot] < 0))
        s.first[slot, first] = position[match[:, first].argmax(axis=0)]
        return [int(p) for p in first]

    def _skip(self, slot: int, position: int) -> None:
        """Account for tokens before `position` of which no activations came.

        A request that starts late had its prefix cached; a gap later on is a pass that was
        lost, and must not look like a cache hit.
        """
        s = self._state
        gap = position - int(s.next[slot])
        if gap <= 0:
            return
        why = UNTRACKED if s.next[slot] else CACHED
        prompt = int(np.clip(s.prompt[slot] - s.next[slot], 0, gap))
        s.counts[slot, PROMPT, why] += prompt
        s.counts[slot, OUTPUT, why] += gap - prompt
        if self._longest > 1:
            missed = np.arange(max(int(s.next[slot]), position - self._longest), position)
            s.ring[slot, missed % self._longest] = -np.inf
        s.next[slot] = position

    def _coverage(self, slot: int, scope: int, tokens: int) -> Coverage:
        s = self._state
        prompt = int(min(s.prompt[slot], tokens))
        lo, hi = (0, prompt) if scope == PROMPT else (prompt, tokens)
        skipped: dict[Reason, int] = {
            reason: int(s.counts[slot, scope, what])
            for what, reason in _REASONS.items()
            if s.counts[slot, scope, what]
        }
        # The last token is never fed back; what else is missing was cut off.
        left = hi - max(lo, min(int(s.next[slot]), hi))
        last = 1 if left and hi == tokens else 0
        if last:
            skipped["not_forwarded"] = 1
        if left - last:
            skipped["aborted"] = left - last
        return Coverage(hi - lo, int(s.counts[slot, scope, EVALUATED]), skipped)

    def _verdict(self, slot: int, i: int, covered: Sequence[Coverage]) -> Verdict:
        s = self._state
        policy = self.watchlist.policies[i]
        scopes = [
            c
            for c, looks in zip(
                covered, (self._prompt_scope[i], self._output_scope[i]), strict=True
            )
            if looks
        ]
        coverage = _add(scopes)
        matched = bool(s.first[slot, i] >= 0)
        error = coverage.skipped.get("error", 0) > 0
        acts = matched and bool(s.enforced[slot, i])
        if policy.action == "clamp":
            acts = acts and bool(s.acted[slot, i])
        score = float(s.score[slot, i])
        return Verdict(
            policy=policy.id,
            digest=policy.digest,
            mode="enforce" if s.enforced[slot, i] else "shadow",
            action=policy.action,
            severity=policy.severity,
            outcome=outcome(matched=matched, error=error, evaluated=coverage.evaluated),
            score=score if np.isfinite(score) else None,
            first_token=int(s.first[slot, i]) if matched else None,
            matched_tokens=int(s.matched[slot, i]),
            acted=policy.action if acts else None,
            features=self._fired(slot, i),
            coverage=coverage,
            error="not_read" if error else None,
        )

    def _fired(self, slot: int, i: int) -> dict[str, Fired]:
        s = self._state
        fired: dict[str, Fired] = {}
        for q in np.flatnonzero(self._terms.policy == i):
            name, count = self._terms.name[q], int(s.fired[slot, q])
            if s.peak_at[slot, q] < 0 or (name in fired and fired[name].count >= count):
                continue
            fired[name] = Fired(count, float(s.peak[slot, q]), int(s.peak_at[slot, q]))
        return fired


def _terms(watchlist: WatchList) -> Terms:
    rows = [
        (
            i,
            watchlist.selection_feature[j],
            watchlist.selection_above[j],
            policy.detect[name].feature,
        )
        for i, (policy, names) in enumerate(
            zip(watchlist.policies, watchlist.policy_selections, strict=True)
        )
        for name, j in names.items()
    ]
    policy, feature, above, name = zip(*rows, strict=True) if rows else ((), (), (), ())
    return Terms(
        np.array(policy, np.intp), np.array(feature, np.intp), np.array(above, np.float64), name
    )


def _add(parts: Sequence[Coverage]) -> Coverage:
    skipped: dict[Reason, int] = {}
    for part in parts:
        for reason, n in part.skipped.items():
            skipped[reason] = skipped.get(reason, 0) + n
    return Coverage(sum(p.tokens for p in parts), sum(p.evaluated for p in parts), skipped)


def balanced(coverage: Coverage) -> bool:
    """Return whether every token is accounted for."""
    return coverage.evaluated + sum(coverage.skipped.values()) == coverage.tokens


def as_dict(coverage: Coverage) -> Mapping[str, Any]:
    """Return the coverage as events and responses show it."""
    return {
        "tokens": coverage.tokens,
        "evaluated": coverage.evaluated,
        "skipped": dict(coverage.skipped),
    }
