"""The memory of the requests in flight: each has a slot of the same arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from saeguard.guard.compiled_rules import Rules
from saeguard.guard.forward_pass import ForwardPass
from saeguard.guard.prefix.blocks import Recent, make_recent
from saeguard.guard.scopes import OUTPUT, count_roles, of_prompt, roles_between
from saeguard.guard.state import (
    State,
    blank,
    copy_slot,
    grown,
    make_state,
    start_slot,
    write_slot,
)

NO_ROLES = np.empty(0, np.uint8)


class Saved(NamedTuple):
    """A copy of a request's state, for `Slots.restore`."""

    state: State
    recent: Recent


class Slots:
    """Gives requests slots of memory, more of it as the load grows."""

    def __init__(self, rules: Rules, slots: int, block: int, columns: int) -> None:
        """Start without requests.

        Args:
            rules: the compiled policies.
            slots: a first guess.
            block: tokens of a block of the prefix cache; 0 without one.
            columns: of a forward pass that are kept until a block is whole.
        """
        self._of: dict[str, int] = {}
        self._free = list(range(slots))[::-1]
        self._by_role = rules.by_role
        self._empty = make_state(rules, 1)
        self._no_recent = make_recent(1, block, columns)
        self.state = blank(self._empty, slots)
        self.recent = blank(self._no_recent, slots)
        self.roles: dict[int, np.ndarray] = {}
        """By slot: the role of each prompt token, if policies need them."""

    def __contains__(self, request_id: str) -> bool:
        """Return whether the request has a slot."""
        return request_id in self._of

    def __len__(self) -> int:
        """Return the number of requests with a slot."""
        return len(self._of)

    def __getitem__(self, request_id: str) -> int:
        """Return the slot of a request."""
        return self._of[request_id]

    def of(self, request_ids: Sequence[str]) -> np.ndarray:
        """Return the slot of each request, -1 for requests without one, int64."""
        return np.array([self._of.get(r, -1) for r in request_ids], np.int64)

    def take(self, request_id: str, prompt_tokens: int, roles: np.ndarray | None) -> int:
        """Start a request of which no token is evaluated yet; return its slot.

        Raises:
            ValueError: roles are needed and missing, or their number is not that of the tokens.
        """
        needed = self._by_role or roles is not None
        given = of_prompt(roles, prompt_tokens) if needed else None
        if not self._free:
            slots = len(self.state.requests)
            self.state = grown(self.state, blank(self._empty, slots))
            self.recent = grown(self.recent, blank(self._no_recent, slots))
            self._free = list(range(slots, 2 * slots))[::-1]
        slot = self._of[request_id] = self._free.pop()
        if given is not None:
            self.roles[slot] = given
        start_slot(self.state, slot, self._empty)
        write_slot(self.recent, slot, self._no_recent)
        self.state.requests[slot]["prompt"] = prompt_tokens
        return slot

    def free(self, request_id: str) -> int:
        """End a request; return the slot that it had."""
        slot = self._of.pop(request_id)
        self.roles.pop(slot, None)
        self._free.append(slot)
        return slot

    def save(self, request_id: str) -> Saved:
        """Return a copy of a request's state, for `restore`."""
        slot = self[request_id]
        return Saved(copy_slot(self.state, slot), copy_slot(self.recent, slot))

    def restore(self, request_id: str, saved: Saved) -> None:
        """Set a request's state back to what `save` returned."""
        slot = self[request_id]
        write_slot(self.state, slot, saved.state)
        write_slot(self.recent, slot, saved.recent)

    def skip(self, slot: int, position: int, why: int) -> None:
        """Skip a request's tokens before `position` for the reason `why`; none of them was read."""
        here = self.state.requests[slot]
        first, prompt = int(here["next"]), int(here["prompt"])
        if position > first:
            counts = count_roles(prompt, self.roles.get(slot), first, position)
            self.state.counts[slot, :, why] += np.array(counts)
            here["next"] = position

    def roles_of(
        self, forward_pass: ForwardPass, slots: np.ndarray, valid: np.ndarray
    ) -> np.ndarray:
        """Return the role of each row, [rows] uint8; nothing if no policy needs them."""
        if not self.roles:
            return NO_ROLES
        roles = np.full(len(forward_pass.positions), OUTPUT, np.uint8)
        starts = forward_pass.query_start[:-1]
        first, prompt = forward_pass.positions[starts], self.state.requests["prompt"][slots]
        for i in np.flatnonzero((first < prompt) & (slots >= 0)).tolist():
            start, at, rows = int(starts[i]), int(first[i]), int(valid[i])
            given = self.roles.get(int(slots[i]))
            roles[start : start + rows] = roles_between(int(prompt[i]), given, at, at + rows)
        return roles
