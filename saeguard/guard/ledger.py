"""The ledger: the requests in flight, their evaluated tokens, and what the rules found."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import NamedTuple

import numpy as np

from saeguard.guard.compiled_rules import is_sampled, make_hits, make_scratch
from saeguard.guard.forward_pass import ForwardPass
from saeguard.guard.prefix.blocks import PrefixBlocks
from saeguard.guard.prefix.store import PrefixStore, PrefixView
from saeguard.guard.read_rows import Reads, as_given, ingest_rows, reads_of
from saeguard.guard.readings import Readings
from saeguard.guard.request_verdicts import Verdicts, verdicts_of
from saeguard.guard.slots import Saved, Slots
from saeguard.guard.tables import CACHED, UNTRACKED
from saeguard.guard.watchlist import WatchList


class Hit(NamedTuple):
    """One policy's first match on a request, or a token that it could not read."""

    request_id: str
    policy: int
    """Index into the watch list's policies."""
    position: int
    error: bool = False
    """True if a token in scope could not be read, False if the policy matched."""


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
        self._rules = rules = watchlist.rules
        self._prefixes = PrefixBlocks(prefix_store) if prefix_store is not None else None
        self._enforced = np.array([p.mode == "enforce" for p in watchlist.policies], bool)
        self._clamped = [i for clamp in watchlist.clamps for i in clamp.policies]
        block, columns = (0, 0) if prefix_store is None else (prefix_store.block, watchlist.columns)
        self._slots = Slots(rules, slots, block, columns)
        self._reads: Reads | None = None
        self._scratch = make_scratch(rules.tables, rules.longest)
        self._hits = make_hits(rules.tables)

    def __contains__(self, request_id: str) -> bool:
        """Return whether the request is in flight."""
        return request_id in self._slots

    def __len__(self) -> int:
        """Return the number of requests in flight."""
        return len(self._slots)

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
        slot = self._slots.take(request_id, prompt_tokens, roles)
        if self._prefixes is not None:
            self._prefixes.admit(slot, keys)
        policies = self._slots.state.policies[slot]
        policies["enforced"] = self._enforced if enforced is None else enforced
        for i in self._rules.sampled:
            policies[i]["sampled"] = is_sampled(self.watchlist.policies[i], request_id)

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
        ids = forward_pass.request_ids
        slots = self._slots.of(ids)
        hits, late = self._advance(forward_pass, slots, valid)
        if not late.any():
            return hits
        first = forward_pass.positions[forward_pass.query_start[:-1]].tolist()
        # In order of position: a request can read a prefix that another one computes in this pass.
        for i in sorted(np.flatnonzero(late).tolist(), key=first.__getitem__):
            expected = self.next_position(ids[i])
            enters = expected == 0 if entering is None else ids[i] in entering
            hits += self._pass_over(ids[i], int(slots[i]), first[i], enters=enters)
            alone = np.full_like(slots, -1)
            alone[i] = slots[i]
            hits += self._advance(forward_pass, alone, valid)[0]
        return hits

    def _advance(
        self, forward_pass: ForwardPass, slots: np.ndarray, valid: np.ndarray
    ) -> tuple[list[Hit], np.ndarray]:
        """Advance requests by the valid rows of a pass that were not evaluated before.

        Tokens that are computed again after a preemption are recorded again, since the prefix store
        may have dropped them with the cache's block.

        Returns:
            The hits; and which requests were passed over, since their first row is not their next
            token: [requests] bool, or empty if there are none.
        """
        if self.readings is not None:
            self._take(self.readings, forward_pass, slots, valid)
        hits, n = self._run(forward_pass, slots, valid)
        late = np.empty(0, bool)
        if n:
            first = forward_pass.positions[forward_pass.query_start[:-1]]
            late = (slots >= 0) & (valid > 0) & (first > self._slots.state.requests["next"][slots])
            slots = np.where(late, -1, slots)
        if self._prefixes is not None:
            self._prefixes.record_pass(self._slots.recent, forward_pass, slots, valid)
        if forward_pass.acted is not None and self._clamped:
            for slot, start, rows in zip(
                slots.tolist(), forward_pass.query_start.tolist(), valid.tolist(), strict=False
            ):
                edited = forward_pass.acted[start : start + rows].any(axis=0)
                if slot >= 0 and edited.any():
                    self._slots.state.policies[slot]["acted"][self._clamped] |= edited
        return hits, late

    def _run(
        self, forward_pass: ForwardPass, slots: np.ndarray, valid: np.ndarray
    ) -> tuple[list[Hit], int]:
        """Run the compiled rules over the rows of a pass; see `ingest_rows`."""
        f = as_given(forward_pass.f, np.float32)
        if self._reads is None or len(self._reads.starts) != f.shape[1] + 1:
            self._reads = reads_of(self.watchlist, f.shape[1])
        given = (
            slots,
            as_given(forward_pass.query_start, np.int64),
            as_given(valid, np.int64),
            as_given(forward_pass.positions, np.int64),
            self._slots.roles_of(forward_pass, slots, valid),
            as_given(forward_pass.eligible, bool),
            f,
            forward_pass.ran,
        )
        ids, hits, late, done = forward_pass.request_ids, list[Hit](), 0, False
        reads, rules, state = self._reads, self._rules.tables, self._slots.state
        while not done:
            found, late, done = ingest_rows(reads, rules, state, self._scratch, *given, self._hits)
            for i, p, t, error in self._hits[:found].tolist() if found else ():
                hits.append(Hit(ids[i], p, t, bool(error)))
        return hits, late

    def finish(self, request_id: str, tokens: int, *, forget: bool = True) -> Verdicts:
        """Return one verdict per policy for a request of `tokens` tokens.

        Args:
            request_id: a request in flight.
            tokens: prompt and output tokens; those never forwarded count as not evaluated.
            forget: end the request; if False, return its verdicts so far.
        """
        state, slot = self._slots.state, self._slots[request_id]
        verdicts = verdicts_of(self._rules, state, slot, self._slots.roles.get(slot), tokens)
        if forget:
            self.forget(request_id)
        return verdicts

    def forget(self, request_id: str) -> None:
        """End a request; store its full blocks whose block hash is known."""
        slot = self._slots.free(request_id)
        if self._prefixes is not None:
            self._prefixes.store()
            self._prefixes.forget(slot)

    def next_position(self, request_id: str) -> int:
        """Return a request's first position that was neither evaluated nor skipped yet."""
        return int(self._slots.state.requests[self._slots[request_id]]["next"])

    def enforces(self, request_id: str, policy: int) -> bool:
        """Return whether a policy's action is to be taken for a request."""
        mine = self._slots.state.policies[self._slots[request_id], policy]
        return bool(mine["enforced"] and mine["sampled"])

    def save(self, request_id: str) -> Saved:
        """Return a copy of a request's state, for `restore`."""
        return self._slots.save(request_id)

    def restore(self, request_id: str, saved: Saved) -> None:
        """Set a request's state back to what `save` returned."""
        self._slots.restore(request_id, saved)
        if self._prefixes is not None:
            slot = self._slots[request_id]
            self._prefixes.take_back(slot, int(saved.state.requests[0]["next"]))

    def _pass_over(self, request_id: str, slot: int, position: int, *, enters: bool) -> list[Hit]:
        """Evaluate or skip the tokens before `position`, which this pass did not compute.

        If the request starts or resumes, their KV came from the prefix cache, so their latents are
        recalled from the prefix store. Otherwise a pass was lost, and they count as untracked.
        """
        hits, store = list[Hit](), self.prefix_store
        if enters and self._prefixes is not None and store is not None:
            first = self.next_position(request_id)
            while first // store.block < position // store.block:
                end, found = self._prefixes.recall(slot, first, position)
                if found is None:
                    self._slots.skip(slot, end, CACHED)
                else:
                    hits += self._recall(request_id, slot, first, *found)
                first = end
        self._slots.skip(slot, position, CACHED if enters else UNTRACKED)
        return hits

    def _recall(
        self, request_id: str, slot: int, first: int, f: np.ndarray, eligible: np.ndarray
    ) -> list[Hit]:
        """Advance one request by cached tokens whose activations are stored."""
        n = len(f)
        recalled = ForwardPass(
            request_ids=[request_id],
            query_start=np.array([0, n]),
            positions=np.arange(first, first + n),
            eligible=eligible,
            f=f,
            acted=None,
            ran=True,
            watchlist="",
        )
        slots, valid = np.array([slot]), np.array([n])
        if self.readings is not None:
            self._take(self.readings, recalled, slots, valid)
        return self._run(recalled, slots, valid)[0]

    def _take(
        self, readings: Readings, forward_pass: ForwardPass, slots: np.ndarray, valid: np.ndarray
    ) -> None:
        read = self.watchlist.read(forward_pass.f, ran=forward_pass.ran)
        readings.take_pass(forward_pass, read, np.where(slots < 0, 0, valid), self.next_position)
