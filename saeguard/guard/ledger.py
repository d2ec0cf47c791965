"""The account of every request in flight: what was seen of each of its tokens, and concluded."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import NamedTuple

import numpy as np

from saeguard.guard.advance import (
    CACHED,
    OUTPUT,
    PROMPT,
    UNTRACKED,
    Tokens,
    advance_many,
    advance_one,
    compile_rules,
    looked,
    skip,
)
from saeguard.guard.conclude import add, coverage_of, verdict_of
from saeguard.guard.memory import Memory, View
from saeguard.guard.packet import Packet
from saeguard.guard.state import State, copy_slot, grown, make_state, write_slot
from saeguard.guard.verdict import Coverage, Verdict
from saeguard.guard.watchlist import WatchList

RECALLED_ROWS = 4096
"""Cached tokens judged at once, which bounds what a long prompt holds."""


class Hit(NamedTuple):
    """A policy that matched a request for the first time, or could not read it."""

    request_id: str
    policy: int
    """Index into the watch list's policies."""
    position: int
    error: bool = False


class Ledger:
    """The requests in flight: `admit`, `ingest` what each pass saw, `finish` into verdicts."""

    def __init__(
        self, watchlist: WatchList, slots: int = 64, *, memory: Memory | View | None = None
    ) -> None:
        """Start empty.

        Args:
            watchlist: the compiled policies.
            slots: a first guess; it grows with the load.
            memory: what was seen of tokens in the prefix cache; None where there is no cache.
        """
        self.watchlist = watchlist
        self.memory = memory
        self.unwatched_passes = 0
        policies = watchlist.policies
        self._rules = compile_rules(watchlist)
        self._enforced = np.array([p.mode == "enforce" for p in policies], bool)
        self._stops_on_error = np.array([p.on_error == "stop" for p in policies], bool)
        self._clamped = [i for clamp in watchlist.clamps for i in clamp.policies]
        self._slot: dict[str, int] = {}
        self._keys: dict[int, Sequence[bytes]] = {}
        """By slot: the keys of its whole blocks, a list that the engine extends."""
        self._unkeyed: list[tuple[int, int, np.ndarray, np.ndarray]] = []
        """Whole blocks whose key is not there yet: (slot, block, activations, watched)."""
        self._free = list(range(slots))[::-1]
        self._state = self._make_state(slots)

    def __contains__(self, request_id: str) -> bool:
        """Return whether the request is in flight."""
        return request_id in self._slot

    def __len__(self) -> int:
        """Return the number of requests in flight."""
        return len(self._slot)

    def admit(
        self,
        request_id: str,
        prompt_tokens: int,
        enforce: Sequence[str] = (),
        keys: Sequence[bytes] = (),
        enforced: Sequence[bool] | None = None,
    ) -> None:
        """Start a request of which nothing has been seen.

        Args:
            request_id: the engine's own id, never the client's.
            prompt_tokens: length of its prompt.
            enforce: ids of shadow policies to enforce for it.
            keys: of its whole blocks in the prefix cache; may grow while it runs.
            enforced: by policy, whether its action is to be taken; None: as the policies say.
        """
        if not self._free:
            slots = len(self._state.next)
            self._state = grown(self._state, self._make_state(slots))
            self._free = list(range(slots, 2 * slots))[::-1]
        slot = self._free.pop()
        self._slot[request_id] = slot
        self._keys[slot] = keys
        s = self._state
        write_slot(s, slot, self._make_state(1))
        s.prompt[slot] = prompt_tokens
        s.enforced[slot] = self._enforced if enforced is None else enforced
        if enforce:
            s.enforced[slot] |= [p.id in enforce for p in self.watchlist.policies]

    def ingest(
        self, packet: Packet, valid: np.ndarray, entering: Container[str] | None = None
    ) -> list[Hit]:
        """Advance every request by the rows of one pass.

        Args:
            packet: what the pass saw.
            valid: [requests] leading rows that count; rejected drafts lie behind them, and a
                request that is no longer of interest has 0.
            entering: requests that start or resume in this pass, and may skip tokens whose KV is
                cached; any other gap is a pass that was lost. None: those of which nothing was
                seen yet.

        Returns:
            Each policy that matched for the first time, and each with `on_error: stop` whose
            tokens could not be read.
        """
        if not packet.ran:
            self.unwatched_passes += 1
        self._store_keyed()
        slots = np.array([self._slot.get(r, -1) for r in packet.request_ids], np.int64)
        starts = packet.query_start[:-1]
        positions = packet.positions[starts]
        known = (slots >= 0) & (valid > 0)
        together = known & (valid == 1) & (positions == self._state.next[slots])
        alone = np.flatnonzero(known & ~together)

        with np.errstate(invalid="ignore", over="ignore"):  # non-finite rows are set apart below
            shares = self.watchlist.shares(packet.f)
            evidence = self.watchlist.evidence(shares)
        finite = np.isfinite(packet.f).all(axis=1) if packet.ran else np.zeros(len(packet.f), bool)
        tokens = Tokens(packet.positions, shares, evidence, packet.watched, finite)

        hits = self._ingest_together(packet, np.flatnonzero(together), slots[together], tokens)
        # In the order of their positions: requests can share a prefix that is computed in the
        # very pass in which another one reads it.
        for i in alone[np.argsort(positions[alone], kind="stable")]:
            request_id, slot, start = packet.request_ids[i], int(slots[i]), int(starts[i])
            expected = int(self._state.next[slot])
            if positions[i] > expected:
                enters = expected == 0 if entering is None else request_id in entering
                hits += self._pass_over(request_id, slot, int(positions[i]), enters=enters)
            rows = np.arange(start, start + int(valid[i]))
            hits += self._ingest_alone(packet, request_id, slot, rows, tokens)
        return hits

    def _ingest_together(
        self, packet: Packet, which: np.ndarray, at: np.ndarray, tokens: Tokens
    ) -> list[Hit]:
        """Advance the requests `which`, in slots `at`, by one row each."""
        if not len(which):
            return []
        rows = packet.query_start[which]
        mine = _take(tokens, rows)
        hits: list[Hit] = []
        matched = advance_many(self._rules, self._state, at, mine)
        if matched is not None:
            hits += [
                Hit(packet.request_ids[which[i]], int(p), int(mine.position[i]))
                for i, p in np.argwhere(matched)
            ]
        for i in np.flatnonzero(~mine.finite):
            one = _take(mine, slice(i, i + 1))
            hits += self._broken(packet.request_ids[which[i]], int(at[i]), one)
        if self.memory is not None:
            self._note(at, mine.position, packet.f[rows], mine.watched, ran=packet.ran)
        if packet.acted is not None and self._clamped:
            self._state.acted[np.ix_(at, np.asarray(self._clamped))] |= packet.acted[rows]
        return hits

    def _ingest_alone(
        self, packet: Packet, request_id: str, slot: int, rows: np.ndarray, tokens: Tokens
    ) -> list[Hit]:
        """Advance one request by consecutive rows, those left out that were seen before.

        What is computed again, after a preemption, is remembered again: it may have been let go
        with the cache's block in between.
        """
        hits: list[Hit] = []
        position = packet.positions[rows]
        fresh = rows[position >= self._state.next[slot]]
        if len(fresh):
            hits = self._advance_alone(request_id, slot, _take(tokens, fresh))
        if self.memory is not None:
            self._note_run(slot, position, packet.f[rows], packet.watched[rows], ran=packet.ran)
        if packet.acted is not None and self._clamped:
            self._state.acted[slot, self._clamped] |= packet.acted[rows].any(axis=0)
        return hits

    def finish(self, request_id: str, tokens: int, *, forget: bool = True) -> list[Verdict]:
        """Return one verdict per policy for a request of `tokens` tokens.

        Args:
            request_id: a request in flight.
            tokens: prompt and output tokens; those never forwarded count as not evaluated.
            forget: end the request; False gives its verdicts so far.
        """
        slot = self._slot[request_id]
        covered = [coverage_of(self._state, slot, scope, tokens) for scope in (PROMPT, OUTPUT)]
        verdicts = [
            verdict_of(self._rules, self._state, slot, i, policy, covered)
            for i, policy in enumerate(self.watchlist.policies)
        ]
        if forget:
            self.forget(request_id)
        return verdicts

    def forget(self, request_id: str) -> None:
        """End a request, and remember what was seen of its last whole blocks."""
        self._store_keyed()
        slot = self._slot.pop(request_id)
        self._unkeyed = [entry for entry in self._unkeyed if entry[0] != slot]
        self._keys.pop(slot)
        self._free.append(slot)

    def coverage(self, request_id: str, tokens: int) -> Coverage:
        """Return the request's own ledger, whatever the policies' scopes."""
        slot = self._slot[request_id]
        return add([coverage_of(self._state, slot, scope, tokens) for scope in (PROMPT, OUTPUT)])

    def seen(self, request_id: str) -> int:
        """Return the position up to which a request's tokens have been accounted for."""
        return int(self._state.next[self._slot[request_id]])

    def enforces(self, request_id: str, policy: int) -> bool:
        """Return whether a policy's action is to be taken for a request."""
        return bool(self._state.enforced[self._slot[request_id], policy])

    def save(self, request_id: str) -> State:
        """Return a copy of all that is known of a request, for `restore`."""
        return copy_slot(self._state, self._slot[request_id])

    def restore(self, request_id: str, saved: State) -> None:
        """Take back what was ingested of a request since `save`."""
        slot = self._slot[request_id]
        write_slot(self._state, slot, saved)
        seen = int(saved.next[0])
        self._unkeyed = [
            e for e in self._unkeyed if e[0] != slot or (e[1] + 1) * self._block <= seen
        ]

    def _make_state(self, slots: int) -> State:
        return make_state(
            slots,
            policies=len(self.watchlist.policies),
            terms=len(self._rules.terms.name),
            longest=self._rules.longest,
            block=self._block,
            columns=self.watchlist.columns if self._block else 0,
        )

    @property
    def _block(self) -> int:
        return 0 if self.memory is None else self.memory.block

    def _advance_alone(self, request_id: str, slot: int, tokens: Tokens) -> list[Hit]:
        matches = advance_one(self._rules, self._state, slot, tokens)
        hits = [Hit(request_id, p, int(self._state.first[slot, p])) for p in matches]
        return hits if tokens.finite.all() else hits + self._broken(request_id, slot, tokens)

    def _broken(self, request_id: str, slot: int, tokens: Tokens) -> list[Hit]:
        """Return the policies that ask for a stop where they cannot read a token in scope."""
        if not self._stops_on_error.any():
            return []
        is_prompt = tokens.position < self._state.prompt[slot]
        unread = looked(self._rules, is_prompt, tokens.watched & ~tokens.finite)
        unread &= self._stops_on_error
        where = unread.argmax(axis=0)
        return [
            Hit(request_id, int(p), int(tokens.position[where[p]]), error=True)
            for p in np.flatnonzero(unread.any(axis=0))
        ]

    # --- the prefix cache -----------------------------------------------------------------------

    def _pass_over(self, request_id: str, slot: int, position: int, *, enters: bool) -> list[Hit]:
        """Account for tokens before `position` that this pass did not compute.

        A request that starts or resumes read them from the prefix cache, where what was seen of
        them is remembered; anything else is a pass that was lost, and must not look like it.
        """
        hits: list[Hit] = []
        if enters and self.memory is not None:
            block, keys = self.memory.block, self._keys[slot]
            i = int(self._state.next[slot]) // block
            while i < position // block and i < len(keys):
                run = self._recall(keys[i : min(position // block, i + RECALLED_ROWS // block)])
                if run is None:
                    skip(self._rules, self._state, slot, (i + 1) * block, CACHED)
                    i += 1
                    continue
                f, watched = run
                first = int(self._state.next[slot])
                fresh = slice(first - i * block, None)
                shares = self.watchlist.shares(f[fresh])
                tokens = Tokens(
                    np.arange(first, i * block + len(f)),
                    shares,
                    self.watchlist.evidence(shares),
                    watched[fresh],
                    np.isfinite(f[fresh]).all(axis=1),
                )
                hits += self._advance_alone(request_id, slot, tokens)
                i += len(f) // block
        skip(self._rules, self._state, slot, position, CACHED if enters else UNTRACKED)
        return hits

    def _recall(self, keys: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray] | None:
        """Return activations and watched of the leading blocks that are remembered."""
        assert self.memory is not None
        found = []
        for key in keys:
            seen = self.memory.get(key)
            if seen is None:
                break
            found.append(seen)
        if not found:
            return None
        return np.concatenate([f for f, _ in found]), np.concatenate([w for _, w in found])

    def _note(
        self, at: np.ndarray, position: np.ndarray, f: np.ndarray, watched: np.ndarray, *, ran: bool
    ) -> None:
        """Keep one row of each of several slots until its block is whole."""
        s = self._state
        jumped = position != s.noted[at]
        s.whole_from[at[jumped]] = position[jumped]
        s.noted[at] = position + 1
        if not ran:
            s.whole_from[at] = position + 1
            return
        inside = position % self._block
        s.recent[at, inside] = f
        s.recent_watched[at, inside] = watched
        for j in np.flatnonzero(inside == self._block - 1):
            self._complete(int(at[j]), int(position[j]) // self._block)
        self._store_keyed()

    def _note_run(
        self, slot: int, position: np.ndarray, f: np.ndarray, watched: np.ndarray, *, ran: bool
    ) -> None:
        """Keep consecutive rows of one slot: whole blocks now, the rest until theirs is."""
        s, block = self._state, self._block
        first, end = int(position[0]), int(position[-1]) + 1
        if first != s.noted[slot]:
            s.whole_from[slot] = first
        s.noted[slot] = end
        if not ran:
            s.whole_from[slot] = end
            return
        start = min(end, -(-first // block) * block)  # of the whole blocks, if there is one
        stop = max(start, end // block * block)
        self._note_part(slot, position[: start - first], f, watched)
        if start > first and start % block == 0:
            self._complete(slot, start // block - 1)
        for o in range(start - first, stop - first, block):
            rows = slice(o, o + block)
            self._unkeyed.append((slot, (first + o) // block, f[rows], watched[rows]))
        rest = slice(stop - first, None)
        self._note_part(slot, position[rest], f[rest], watched[rest])
        self._store_keyed()

    def _note_part(
        self, slot: int, position: np.ndarray, f: np.ndarray, watched: np.ndarray
    ) -> None:
        inside = position % self._block
        self._state.recent[slot, inside] = f[: len(inside)]
        self._state.recent_watched[slot, inside] = watched[: len(inside)]

    def _complete(self, slot: int, i: int) -> None:
        """Take a block whose last row has come, if none of its rows is missing."""
        s = self._state
        if s.whole_from[slot] <= i * self._block:
            self._unkeyed.append((slot, i, s.recent[slot].copy(), s.recent_watched[slot].copy()))

    def _store_keyed(self) -> None:
        """Remember the whole blocks whose key the engine has made; drafts have none yet."""
        if not self._unkeyed:
            return
        assert self.memory is not None
        ready = [e for e in self._unkeyed if e[1] < len(self._keys[e[0]])]
        self._unkeyed = [e for e in self._unkeyed if e[1] >= len(self._keys[e[0]])]
        if ready:
            self.memory.put(
                [self._keys[slot][i] for slot, i, _, _ in ready],
                np.stack([f for _, _, f, _ in ready]),
                np.stack([watched for _, _, _, watched in ready]),
            )


def _take(tokens: Tokens, rows: np.ndarray | slice) -> Tokens:
    return Tokens(*(field[rows] for field in tokens))
