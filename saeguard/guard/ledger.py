"""The ledger: the requests in flight, their evaluated tokens, and what the rules found."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import TypeAlias

import numpy as np

from saeguard.guard.compiled_rules import is_sampled
from saeguard.guard.evaluate import CACHED, UNTRACKED, Tokens, advance, skip
from saeguard.guard.forward_pass import ForwardPass, in_step
from saeguard.guard.hits import Hit, matched, unread
from saeguard.guard.prefix.blocks import PrefixBlocks
from saeguard.guard.prefix.store import PrefixStore, PrefixView
from saeguard.guard.readings import Readings
from saeguard.guard.request_verdicts import Verdicts, verdicts_of, whole_coverage
from saeguard.guard.scopes import of_prompt
from saeguard.guard.state import State, blank, copy_slot, grown, make_state, write_slot
from saeguard.guard.verdict import Coverage
from saeguard.guard.watchlist import WatchList

CELLS = 2**15
"""Most numbers in one array of a block; larger arrays do not fit the CPU's caches."""

ValidPass: TypeAlias = tuple[ForwardPass, np.ndarray, Container[str]]
"""A forward pass, its `valid` rows and the requests `entering`, as `Ledger.ingest` takes them."""


class Ledger:
    """Judges requests in flight: `admit` them, `ingest` forward passes, `finish` into verdicts."""

    def __init__(
        self,
        watchlist: WatchList,
        slots: int = 256,
        *,
        prefix_store: PrefixStore | PrefixView | None = None,
    ) -> None:
        """Start without requests.

        Args:
            watchlist: the compiled policies.
            slots: a first guess; the ledger grows with the load.
            prefix_store: fired latents of tokens in the prefix cache; None without a cache.
        """
        self.watchlist = watchlist
        self.prefix_store = prefix_store
        self.unwatched_passes = 0
        self.readings: Readings | None = None
        """Collects the feature values of whole texts; None while serving."""
        self._rules = watchlist.rules
        self._prefixes = PrefixBlocks(prefix_store) if prefix_store is not None else None
        self._enforced = np.array([p.mode == "enforce" for p in watchlist.policies], bool)
        self._stops_on_error = np.array([p.on_error == "stop" for p in watchlist.policies], bool)
        self._clamped = [i for clamp in watchlist.clamps for i in clamp.policies]
        self._sampling = [i for i, p in enumerate(watchlist.policies) if p.sample < 1]
        self._width = max(len(watchlist.policies), len(self._rules.terms.trace))
        self._slot: dict[str, int] = {}
        self._free = list(range(slots))[::-1]
        block, columns = (0, 0) if prefix_store is None else (prefix_store.block, watchlist.columns)
        self._together = block or CELLS
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
        keys: Sequence[bytes] = (),
        enforced: Sequence[bool] | None = None,
        roles: np.ndarray | None = None,
    ) -> None:
        """Start a request; none of its tokens is evaluated yet.

        Args:
            request_id: the engine's own id, never the client's.
            prompt_tokens: length of its prompt.
            keys: block hashes of its full blocks; the engine extends the list while it runs.
            enforced: by policy, whether its action is to be taken; None: as the policies say.
            roles: [prompt tokens] role of each token; needed if a policy's scope is a role.

        Raises:
            ValueError: roles are needed and missing, or their number is not that of the tokens.
        """
        if not self._free:
            slots = len(self._state.next)
            self._state = grown(self._state, blank(self._empty, slots))
            self._free = list(range(slots, 2 * slots))[::-1]
        slot = self._slot[request_id] = self._free.pop()
        if self._prefixes is not None:
            self._prefixes.admit(slot, keys)
        s = self._state
        write_slot(s, slot, self._empty)
        s.prompt[slot] = prompt_tokens
        if self._rules.by_role:
            s.roles[slot] = of_prompt(roles, prompt_tokens)
        s.enforced[slot] = self._enforced if enforced is None else enforced
        for i in self._sampling:
            s.sampled[slot, i] = is_sampled(self.watchlist.policies[i], request_id)

    def ingest(
        self, forward_pass: ForwardPass, valid: np.ndarray, entering: Container[str] | None = None
    ) -> list[Hit]:
        """Advance every request by the rows of one forward pass.

        Args:
            forward_pass: the rows and their activations.
            valid: [requests] leading rows that count, without rejected drafts; 0 if it has ended.
            entering: requests that start or resume in this pass. They may skip tokens whose KV is
                cached; any other gap is a lost pass. None: requests without evaluated tokens.

        Returns:
            The policies that matched for the first time, and the policies with `on_error: stop`
            that could not read a token.
        """
        self.unwatched_passes += not forward_pass.ran
        if self._prefixes is not None:
            self._prefixes.store()
        slots = self._slots(forward_pass)
        starts = forward_pass.query_start[:-1]
        positions = forward_pass.positions[starts]
        known = (slots >= 0) & (valid > 0)
        together = known & (valid == 1) & (positions == self._state.next[slots])
        alone = np.flatnonzero(known & ~together)
        read = self.watchlist.read(forward_pass.f, ran=forward_pass.ran)
        block = Tokens(forward_pass.positions, read.shares, forward_pass.eligible, *read[1:])
        hits: list[Hit] = []
        which = np.flatnonzero(together)
        if len(which):
            rows = starts[which][:, None]
            tokens = block.take(rows)
            ids = [forward_pass.request_ids[i] for i in which]
            hits += self._advance(ids, slots[which], tokens)
            self._record(slots[which], tokens, forward_pass.f[rows], ran=forward_pass.ran)
            self._mark_edited(slots[which], forward_pass.acted, rows)
        # In order of position: a request can read a prefix that another one computes in this pass.
        for i in alone[np.argsort(positions[alone], kind="stable")]:
            request_id, slot, start = forward_pass.request_ids[i], int(slots[i]), int(starts[i])
            expected = int(self._state.next[slot])
            if positions[i] > expected:
                enters = expected == 0 if entering is None else request_id in entering
                hits += self._pass_over(request_id, slot, int(positions[i]), enters=enters)
            rows = np.arange(start, start + int(valid[i]))
            hits += self._ingest_alone(forward_pass, block, request_id, slot, rows)
        return hits

    def ingest_all(self, passes: Sequence[ValidPass]) -> list[Hit]:
        """Advance every request by several forward passes, in order.

        Passes in which the same requests bring their next token are evaluated as one block, which
        costs little more than one of them.
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

    def _ingest_run(self, passes: Sequence[ValidPass]) -> list[Hit]:
        """Advance requests by passes that bring one token of each request."""
        run = [forward_pass for forward_pass, _, _ in passes]
        slots, expected = self._slots(run[0]), run[0].positions
        if (slots < 0).any() or (self._state.next[slots] != expected).any():
            return [hit for one in passes for hit in self.ingest(*one)]
        f = np.stack([forward_pass.f for forward_pass in run], axis=1)
        read = self.watchlist.read(f.reshape(-1, f.shape[-1]))
        block = Tokens(
            expected[:, None] + np.arange(len(run)),
            read.shares.reshape(*f.shape[:2], -1),
            np.stack([forward_pass.eligible for forward_pass in run], axis=1),
            read.finite.reshape(f.shape[:2]),
            read.massive.reshape(f.shape[:2]),
        )
        hits = self._advance(run[0].request_ids, slots, block)
        self._record(slots, block, f, ran=True)
        for forward_pass in run:
            self._mark_edited(slots, forward_pass.acted, np.arange(len(slots))[:, None])
        return hits

    def _ingest_alone(
        self, forward_pass: ForwardPass, block: Tokens, request_id: str, slot: int, rows: np.ndarray
    ) -> list[Hit]:
        """Advance one request by those of its consecutive rows that were not evaluated before.

        Tokens that are computed again after a preemption are recorded again, since the prefix store
        may have dropped them with the cache's block.
        """
        position, at = block.position[rows], np.array([slot])
        fresh = rows[position >= self._state.next[slot]]
        hits = self._advance([request_id], at, block.take(fresh[None])) if len(fresh) else []
        if self._prefixes is not None:
            given = (position, forward_pass.f[rows], block.eligible[rows])
            self._prefixes.record_run(self._state, slot, *given, ran=forward_pass.ran)
        self._mark_edited(at, forward_pass.acted, rows[None])
        return hits

    def finish(self, request_id: str, tokens: int, *, forget: bool = True) -> Verdicts:
        """Return one verdict per policy for a request of `tokens` tokens.

        Args:
            request_id: a request in flight.
            tokens: prompt and output tokens; those never forwarded count as not evaluated.
            forget: end the request; if False, return its verdicts so far.
        """
        verdicts = verdicts_of(self._rules, self._state, self._slot[request_id], tokens)
        if forget:
            self.forget(request_id)
        return verdicts

    def forget(self, request_id: str) -> None:
        """End a request; store its full blocks whose block hash is known."""
        slot = self._slot.pop(request_id)
        if self._prefixes is not None:
            self._prefixes.store()
            self._prefixes.forget(slot)
        self._free.append(slot)

    def coverage(self, request_id: str, tokens: int) -> Coverage:
        """Return the coverage of all tokens of a request, whatever the policies' scopes."""
        return whole_coverage(self._state, self._slot[request_id], tokens)

    def next_position(self, request_id: str) -> int:
        """Return a request's first position that was neither evaluated nor skipped yet."""
        return int(self._state.next[self._slot[request_id]])

    def enforces(self, request_id: str, policy: int) -> bool:
        """Return whether a policy's action is to be taken for a request."""
        slot = self._slot[request_id]
        return bool(self._state.enforced[slot, policy] and self._state.sampled[slot, policy])

    def save(self, request_id: str) -> State:
        """Return a copy of a request's state, for `restore`."""
        return copy_slot(self._state, self._slot[request_id])

    def restore(self, request_id: str, saved: State) -> None:
        """Set a request's state back to what `save` returned."""
        slot = self._slot[request_id]
        write_slot(self._state, slot, saved)
        if self._prefixes is not None:
            self._prefixes.take_back(slot, int(saved.next[0]))

    def _slots(self, forward_pass: ForwardPass) -> np.ndarray:
        return np.array([self._slot.get(r, -1) for r in forward_pass.request_ids], np.int64)

    def _advance(self, ids: Sequence[str], slots: np.ndarray, tokens: Tokens) -> list[Hit]:
        if self.readings is not None:
            self.readings.take(ids, tokens)
        with np.errstate(invalid="ignore", over="ignore"):
            first = advance(self._rules, self._state, slots, tokens)
        wanted = self._stops_on_error
        return matched(ids, first) + unread(self._rules, self._state, slots, ids, tokens, wanted)

    def _record(self, slots: np.ndarray, tokens: Tokens, f: np.ndarray, *, ran: bool) -> None:
        if self._prefixes is not None:
            self._prefixes.record(self._state, slots, tokens.position, f, tokens.eligible, ran=ran)

    def _mark_edited(self, slots: np.ndarray, acted: np.ndarray | None, rows: np.ndarray) -> None:
        """Mark the clamps that edited `rows` [requests, tokens] of a pass."""
        if acted is not None and self._clamped:
            self._state.acted[np.ix_(slots, np.asarray(self._clamped))] |= acted[rows].any(axis=1)

    def _pass_over(self, request_id: str, slot: int, position: int, *, enters: bool) -> list[Hit]:
        """Evaluate or skip the tokens before `position`, which this pass did not compute.

        If the request starts or resumes, their KV came from the prefix cache, so their latents are
        recalled from the prefix store. Otherwise a pass was lost, and they count as untracked.
        """
        hits, store = list[Hit](), self.prefix_store
        if enters and self._prefixes is not None and store is not None:
            first = int(self._state.next[slot])
            while first // store.block < position // store.block:
                end, found = self._prefixes.recall(slot, first, position)
                if found is None:
                    skip(self._rules, self._state, slot, end, CACHED)
                else:
                    read = self.watchlist.read(found[0])
                    tokens = Tokens(np.arange(first, end), read.shares, found[1], *read[1:])
                    hits += self._advance([request_id], np.array([slot]), tokens.take(None))
                first = end
        skip(self._rules, self._state, slot, position, CACHED if enters else UNTRACKED)
        return hits
