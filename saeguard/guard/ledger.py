"""The account of every request in flight: what was seen of each of its tokens, and concluded."""

from __future__ import annotations

import sys
from collections.abc import Container, Sequence
from typing import NamedTuple

import numpy as np

from saeguard.guard.evaluate import CACHED, UNTRACKED, Tokens, advance, roles_at, skip
from saeguard.guard.forward_pass import ForwardPass, in_step
from saeguard.guard.prefix.blocks import PrefixBlocks
from saeguard.guard.prefix.store import PrefixStore, PrefixView
from saeguard.guard.request_verdicts import Verdicts, add, coverages, verdicts_of
from saeguard.guard.sampling import is_sampled
from saeguard.guard.scopes import in_scopes, of_prompt
from saeguard.guard.state import State, blank, copy_slot, grown, make_state, write_slot
from saeguard.guard.verdict import Coverage
from saeguard.guard.watchlist import WatchList

CELLS = 2**15
"""Numbers in an array of a block of several passes, at most: more than fit the cache cost time."""


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
        self,
        watchlist: WatchList,
        slots: int = 256,
        *,
        prefix_store: PrefixStore | PrefixView | None = None,
    ) -> None:
        """Start empty.

        Args:
            watchlist: the compiled policies.
            slots: a first guess; it grows with the load.
            prefix_store: what was seen of tokens in the prefix cache; None where there is no cache.
        """
        self.watchlist = watchlist
        self.prefix_store = prefix_store
        self.unwatched_passes = 0
        policies = watchlist.policies
        self._rules = watchlist.rules
        self._prefixes = PrefixBlocks(prefix_store) if prefix_store is not None else None
        self._enforced = np.array([p.mode == "enforce" for p in policies], bool)
        self._stops_on_error = np.array([p.on_error == "stop" for p in policies], bool)
        self._clamped = [i for clamp in watchlist.clamps for i in clamp.policies]
        self._sampling = [i for i, p in enumerate(policies) if p.sample < 1]
        self._width = max(len(policies), len(self._rules.terms.trace))
        self._together = sys.maxsize if prefix_store is None else prefix_store.block
        self._slot: dict[str, int] = {}
        self._free = list(range(slots))[::-1]
        block = 0 if prefix_store is None else prefix_store.block
        columns = watchlist.columns if block else 0
        self._empty = make_state(self._rules, 1, block=block, columns=columns)
        self._state = blank(self._empty, slots)

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
        roles: np.ndarray | None = None,
    ) -> None:
        """Start a request of which nothing has been seen.

        Args:
            request_id: the engine's own id, never the client's.
            prompt_tokens: length of its prompt.
            enforce: ids of shadow policies to enforce for it.
            keys: of its whole blocks in the prefix cache; may grow while it runs.
            enforced: by policy, whether its action is to be taken; None: as the policies say.
            roles: [prompt tokens] whose turn each is in, see `guard.roles.assign`; needed where
                a policy's scope is a role.

        Raises:
            ValueError: roles are needed and missing, or there are more or fewer than tokens.
        """
        if not self._free:
            slots = len(self._state.next)
            self._state = grown(self._state, blank(self._empty, slots))
            self._free = list(range(slots, 2 * slots))[::-1]
        slot = self._free.pop()
        self._slot[request_id] = slot
        if self._prefixes is not None:
            self._prefixes.admit(slot, keys)
        s = self._state
        write_slot(s, slot, self._empty)
        s.prompt[slot] = prompt_tokens
        if self._rules.by_role:
            s.roles[slot] = of_prompt(roles, prompt_tokens)
        s.enforced[slot] = self._enforced if enforced is None else enforced
        if enforce:
            s.enforced[slot] |= [p.id in enforce for p in self.watchlist.policies]
        for i in self._sampling:
            s.sampled[slot, i] = is_sampled(self.watchlist.policies[i], request_id)

    def ingest(
        self, forward_pass: ForwardPass, valid: np.ndarray, entering: Container[str] | None = None
    ) -> list[Hit]:
        """Advance every request by the rows of one pass.

        Args:
            forward_pass: what the pass saw.
            valid: [requests] leading rows that count; rejected drafts lie behind them, and a
                request that is no longer of interest has 0.
            entering: requests that start or resume in this pass, and may skip tokens whose KV is
                cached; any other gap is a pass that was lost. None: those of which nothing was
                seen yet.

        Returns:
            Each policy that matched for the first time, and each with `on_error: stop` whose
            tokens could not be read.
        """
        if not forward_pass.ran:
            self.unwatched_passes += 1
        if self._prefixes is not None:
            self._prefixes.store()
        slots = self._slots(forward_pass)
        starts = forward_pass.query_start[:-1]
        positions = forward_pass.positions[starts]
        known = (slots >= 0) & (valid > 0)
        together = known & (valid == 1) & (positions == self._state.next[slots])
        alone = np.flatnonzero(known & ~together)
        shares, finite = self._read(forward_pass.f, ran=forward_pass.ran)

        hits: list[Hit] = []
        which = np.flatnonzero(together)
        if len(which):
            rows = starts[which][:, None]
            tokens = Tokens(
                forward_pass.positions[rows],
                shares[rows],
                forward_pass.eligible[rows],
                finite[rows],
            )
            ids = [forward_pass.request_ids[i] for i in which]
            hits += self._advance(ids, slots[which], tokens)
            self._note(slots[which], tokens, forward_pass.f[rows], ran=forward_pass.ran)
            self._edited(slots[which], forward_pass.acted, rows)
        # In the order of their positions: requests can share a prefix that is computed in the
        # very pass in which another one reads it.
        for i in alone[np.argsort(positions[alone], kind="stable")]:
            request_id, slot, start = forward_pass.request_ids[i], int(slots[i]), int(starts[i])
            expected = int(self._state.next[slot])
            if positions[i] > expected:
                enters = expected == 0 if entering is None else request_id in entering
                hits += self._pass_over(request_id, slot, int(positions[i]), enters=enters)
            rows = np.arange(start, start + int(valid[i]))
            hits += self._ingest_alone(forward_pass, request_id, slot, rows, shares, finite)
        return hits

    def ingest_all(
        self, passes: Sequence[tuple[ForwardPass, np.ndarray, Container[str]]]
    ) -> list[Hit]:
        """Advance every request by several passes, in order.

        Passes in which the same requests bring their next token are advanced as one block: after
        the first of them, the rules' code and state are warm, and an array operation more costs
        as much as an array operation of one token.
        """
        hits: list[Hit] = []
        i = 0
        while i < len(passes):
            cells = len(passes[i][0].request_ids) * self._width
            most = min(self._together, max(1, CELLS // max(1, cells)))
            run = in_step(passes[i : i + most])
            hits += self._ingest_run(passes[i : i + run]) if run > 1 else self.ingest(*passes[i])
            i += run
        return hits

    def _ingest_run(
        self, passes: Sequence[tuple[ForwardPass, np.ndarray, Container[str]]]
    ) -> list[Hit]:
        """Advance requests that bring one token in each of several passes, and nothing else."""
        packets = [forward_pass for forward_pass, _, _ in passes]
        slots = self._slots(packets[0])
        expected = packets[0].positions
        if (slots < 0).any() or (self._state.next[slots] != expected).any():
            return [hit for one in passes for hit in self.ingest(*one)]
        f = np.stack([forward_pass.f for forward_pass in packets], axis=1)
        shares, finite = self._read(f.reshape(-1, f.shape[-1]), ran=True)
        block = Tokens(
            expected[:, None] + np.arange(len(packets)),
            shares.reshape(*f.shape[:2], -1),
            np.stack([forward_pass.eligible for forward_pass in packets], axis=1),
            finite.reshape(f.shape[:2]),
        )
        hits = self._advance(packets[0].request_ids, slots, block)
        self._note(slots, block, f, ran=True)
        for forward_pass in packets:
            self._edited(slots, forward_pass.acted, np.arange(len(slots))[:, None])
        return hits

    def _ingest_alone(
        self,
        forward_pass: ForwardPass,
        request_id: str,
        slot: int,
        rows: np.ndarray,
        shares: np.ndarray,
        finite: np.ndarray,
    ) -> list[Hit]:
        """Advance one request by consecutive rows, those left out that were seen before.

        What is computed again, after a preemption, is remembered again: it may have been let go
        with the cache's block in between.
        """
        hits: list[Hit] = []
        position = forward_pass.positions[rows]
        fresh = rows[position >= self._state.next[slot]]
        at = np.array([slot])
        if len(fresh):
            block = (forward_pass.positions, shares, forward_pass.eligible, finite)
            hits = self._advance([request_id], at, Tokens(*(part[fresh][None] for part in block)))
        if self._prefixes is not None:
            self._prefixes.note_run(
                self._state,
                slot,
                position,
                forward_pass.f[rows],
                forward_pass.eligible[rows],
                ran=forward_pass.ran,
            )
        self._edited(at, forward_pass.acted, rows[None])
        return hits

    def finish(self, request_id: str, tokens: int, *, forget: bool = True) -> Verdicts:
        """Return one verdict per policy for a request of `tokens` tokens.

        Args:
            request_id: a request in flight.
            tokens: prompt and output tokens; those never forwarded count as not evaluated.
            forget: end the request; False gives its verdicts so far.
        """
        slot = self._slot[request_id]
        verdicts = verdicts_of(self._rules, self._state, slot, tokens)
        if forget:
            self.forget(request_id)
        return verdicts

    def forget(self, request_id: str) -> None:
        """End a request, and remember what was seen of its last whole blocks."""
        slot = self._slot.pop(request_id)
        if self._prefixes is not None:
            self._prefixes.store()
            self._prefixes.forget(slot)
        self._free.append(slot)

    def coverage(self, request_id: str, tokens: int) -> Coverage:
        """Return the request's own ledger, whatever the policies' scopes."""
        slot = self._slot[request_id]
        return add(coverages(self._state, slot, tokens))

    def seen(self, request_id: str) -> int:
        """Return the position up to which a request's tokens have been accounted for."""
        return int(self._state.next[self._slot[request_id]])

    def enforces(self, request_id: str, policy: int) -> bool:
        """Return whether a policy's action is to be taken for a request."""
        slot = self._slot[request_id]
        return bool(self._state.enforced[slot, policy] and self._state.sampled[slot, policy])

    def save(self, request_id: str) -> State:
        """Return a copy of all that is known of a request, for `restore`."""
        return copy_slot(self._state, self._slot[request_id])

    def restore(self, request_id: str, saved: State) -> None:
        """Take back what was ingested of a request since `save`."""
        slot = self._slot[request_id]
        write_slot(self._state, slot, saved)
        if self._prefixes is not None:
            self._prefixes.take_back(slot, int(saved.next[0]))

    def _slots(self, forward_pass: ForwardPass) -> np.ndarray:
        return np.array([self._slot.get(r, -1) for r in forward_pass.request_ids], np.int64)

    def _read(self, f: np.ndarray, *, ran: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return shares [rows, features], and which rows could be read."""
        with np.errstate(invalid="ignore", over="ignore"):  # non-finite rows are set apart
            shares = self.watchlist.shares(f)
        return shares, np.isfinite(f).all(axis=1) if ran else np.zeros(len(f), bool)

    def _advance(self, ids: Sequence[str], at: np.ndarray, tokens: Tokens) -> list[Hit]:
        with np.errstate(invalid="ignore", over="ignore"):
            first = advance(self._rules, self._state, at, tokens)
        hits = []
        if first is not None:
            hits += [Hit(ids[r], int(p), int(first[r, p])) for r, p in np.argwhere(first >= 0)]
        return hits if tokens.finite.all() else hits + self._broken(ids, at, tokens)

    def _broken(self, ids: Sequence[str], at: np.ndarray, tokens: Tokens) -> list[Hit]:
        """Return the policies that ask for a stop where they cannot read a token in scope."""
        if not self._stops_on_error.any():
            return []
        role = roles_at(self._state, at, tokens.position)
        unread = in_scopes(role, tokens.eligible & ~tokens.finite)[..., self._rules.scope]
        unread &= self._stops_on_error & self._state.sampled[at, None]
        where = unread.argmax(axis=1)
        return [
            Hit(ids[r], int(p), int(tokens.position[r, where[r, p]]), error=True)
            for r, p in np.argwhere(unread.any(axis=1))
        ]

    def _note(self, at: np.ndarray, tokens: Tokens, f: np.ndarray, *, ran: bool) -> None:
        if self._prefixes is not None:
            self._prefixes.note(self._state, at, tokens.position, f, tokens.eligible, ran=ran)

    def _edited(self, at: np.ndarray, acted: np.ndarray | None, rows: np.ndarray) -> None:
        """Note where clamps edited `rows` [requests, tokens] of a pass."""
        if acted is not None and self._clamped:
            self._state.acted[np.ix_(at, np.asarray(self._clamped))] |= acted[rows].any(axis=1)

    def _pass_over(self, request_id: str, slot: int, position: int, *, enters: bool) -> list[Hit]:
        """Account for tokens before `position` that this pass did not compute.

        A request that starts or resumes read them from the prefix cache, where what was seen of
        them is remembered; anything else is a pass that was lost, and must not look like it.
        """
        hits: list[Hit] = []
        if enters and self._prefixes is not None:
            first = int(self._state.next[slot])
            while (
                first // self._prefixes.prefix_store.block
                < position // self._prefixes.prefix_store.block
            ):
                end, seen = self._prefixes.recall(slot, first, position)
                if seen is None:
                    skip(self._rules, self._state, slot, end, CACHED)
                else:
                    shares, finite = self._read(seen[0], ran=True)
                    block = (np.arange(first, end), shares, seen[1], finite)
                    tokens = Tokens(*(part[None] for part in block))
                    hits += self._advance([request_id], np.array([slot]), tokens)
                first = end
        skip(self._rules, self._state, slot, position, CACHED if enters else UNTRACKED)
        return hits
