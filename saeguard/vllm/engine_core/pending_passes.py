"""Judge the forward pass of each step, and mark the requests that must stop."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from saeguard.errors import CannotRunError
from saeguard.guard.forward_pass import ForwardPass
from saeguard.guard.ledger import Hit
from saeguard.guard.slots import Saved
from saeguard.reload.versions import Versions
from saeguard.vllm.messages import SELF_TEST


class ForwardPassError(CannotRunError):
    """The worker was started with another watch list than the engine core."""


class Stop(NamedTuple):
    """Why a request must end, and how many of its tokens stay."""

    policy: str
    tokens: int
    """Number of tokens that stay: up to the one that fired, which the client has already."""
    error: bool


class PendingPasses:
    """Brings each step's forward pass to the rules, and marks the requests that must stop.

    If a policy may stop a request, the pass is judged before vLLM updates its requests, so that the
    stop is part of the update. Else it is judged after the update, which says where drafts end.
    """

    def __init__(self, versions: Versions, requests: Mapping[str, Any], first: str) -> None:
        """Start without forward passes.

        Args:
            versions: with the ledgers of the requests in flight.
            requests: vLLM's requests in flight, by id; the engine guard maintains the mapping.
            first: digest of the watch list that the workers were started with.
        """
        self.versions = versions
        self.requests = requests
        self.first = first
        self.stopping: dict[str, Stop] = {}
        """Requests that must stop, until the scheduler has stopped them."""
        self.lost = 0
        """Number of forward passes that did not arrive with their step."""
        self._pending: tuple[ForwardPass, np.ndarray, frozenset[str]] | None = None
        """This step's forward pass until it is judged, the rows that count, and who enters."""
        self._saved: list[tuple[int, Saved]] = []
        """Index and earlier state of each request that has drafts in this step."""
        self._at_once = False
        """Whether this step's forward pass must be judged before the scheduler reads its output."""

    def push(
        self,
        forward_pass: ForwardPass,
        valid: np.ndarray,
        entering: frozenset[str],
        drafted: Collection[str],
    ) -> None:
        """Take a step's forward pass; judge it at once if any policy may stop a request.

        Args:
            forward_pass: what the taps read.
            valid: [requests] leading rows that count.
            entering: requests that start or resume in this step.
            drafted: requests with draft tokens in this step, which may end within them.

        Raises:
            ForwardPassError: worker and engine core were started with different watch lists.
        """
        if forward_pass.watchlist != self.first:
            raise ForwardPassError(
                f"saeguard: the worker watches {forward_pass.watchlist[:12]}, the engine core "
                f"{self.first[:12]}: policy files changed during start-up; start again"
            )
        self._pending = forward_pass, valid, entering
        self._at_once = any(version.can_stop for version in self.versions.live)
        if self._at_once:
            ids = forward_pass.request_ids
            self._saved = [
                (i, self.versions[ids[i]].ledger.save(ids[i]))
                for i in (np.flatnonzero(valid > 1) if drafted else ())
                if ids[i] in drafted
            ]
            self.catch_up()

    def roll_back(self, forward_pass: ForwardPass) -> None:
        """Drop the rows after the end of each request that ended within its drafts.

        Then the forward pass is judged, if it was not before.
        """
        firsts = forward_pass.positions[forward_pass.query_start[:-1]]
        if self._at_once:
            for i, state in self._saved:
                request_id = forward_pass.request_ids[i]
                request = self.requests.get(request_id)  # None: its client left during the step
                if request is None:
                    continue
                ledger = self.versions[request_id].ledger
                if ledger.next_position(request_id) > request.num_tokens:
                    ledger.restore(request_id, state)
                    again = np.zeros(len(firsts), np.int64)
                    again[i] = request.num_tokens - int(firsts[i])
                    self.versions.ingest(forward_pass, again, ())
            self._saved = []
            return
        if self._pending is None:  # a request ended in error during vLLM's update and was judged
            return
        valid = self._pending[1]
        for i in np.flatnonzero(valid > 1):
            request = self.requests.get(forward_pass.request_ids[i])
            if request is not None:
                valid[i] = min(valid[i], max(0, request.num_tokens - int(firsts[i])))
        self.catch_up()

    def catch_up(self) -> None:
        """Judge this step's forward pass, if it was not judged yet."""
        pending, self._pending = self._pending, None
        if pending is not None:
            for hit in self.versions.ingest(*pending):
                self._consider(hit)

    def lose(self, request_ids: Iterable[str]) -> None:
        """Count a forward pass that did not arrive; `on_error: stop` ends its requests."""
        self.lost += 1
        for request_id in request_ids:
            if request_id in self.requests:
                policies = self.versions[request_id].watchlist.policies
                for i, policy in enumerate(policies):
                    if policy.on_error == "stop":
                        seen = self.requests[request_id].num_tokens
                        self._consider(Hit(request_id, i, seen - 1, error=True))

    def _consider(self, hit: Hit) -> None:
        """Mark a request as stopping, if the hit's policy is enforced and stops on such a hit."""
        if hit.request_id not in self.requests:
            return
        version = self.versions[hit.request_id]
        policy = version.watchlist.policies[hit.policy]
        if (
            (hit.error or policy.action == "stop")
            and not hit.request_id.startswith(SELF_TEST)
            and version.ledger.enforces(hit.request_id, hit.policy)
        ):
            stop = Stop(policy.id, hit.position + 1, hit.error)
            earlier = self.stopping.get(hit.request_id)
            if earlier is None or stop.tokens < earlier.tokens:
                self.stopping[hit.request_id] = stop
