"""One engine core's guard: it follows requests from their admission to their verdicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np
import structlog

from saeguard.events.records import coverage_record
from saeguard.guard.compiled import warn_if_slow
from saeguard.guard.prefix.store import PrefixStore
from saeguard.guard.readings import Readings
from saeguard.guard.request_verdicts import Verdicts
from saeguard.guard.roles.assign import RoleMarks, check_roles
from saeguard.guard.verdict import Coverage
from saeguard.guard.watchlist import WatchList
from saeguard.reload.dry_run import warm_up
from saeguard.reload.reloader import Reloader
from saeguard.reload.versions import Versions, make_version
from saeguard.reload.worker_updates import Admitted, UpdateQueue, WorkerUpdate
from saeguard.vllm.engine_core.admission import Admission, admission_of
from saeguard.vllm.engine_core.pending_passes import PendingPasses
from saeguard.vllm.engine_core.prompt_roles import prompt_roles
from saeguard.vllm.engine_core.response import reading_response, response
from saeguard.vllm.engine_core.telemetry import Telemetry
from saeguard.vllm.messages import ENFORCE, SELF_TEST, STOP_REASON, TENANT
from saeguard.vllm.patches import reads
from saeguard.vllm.settings import Settings, access_of
from saeguard.vllm.startup import Started

log = structlog.get_logger("saeguard")

EARLY = frozenset({"abort", "error"})
"""Reasons to end a request while forward passes with it may still be under way."""

reads(
    "vllm.v1.request:Request",
    "request_id",
    "sampling_params",
    "lora_request",
    "num_tokens",
    "num_prompt_tokens",
    "num_computed_tokens",
    "block_hashes",
    "stop_reason",
    why="one ledger entry per request, its coverage, and the prefix cache's keys of its blocks",
)
reads(
    "vllm.sampling_params:SamplingParams",
    "extra_args",
    why="what a request asks for, and its tenant",
)
reads("vllm.lora.request:LoRARequest", "lora_name", why="the model that a request names")


class EngineGuard:
    """Judges the requests of one engine core."""

    def __init__(
        self,
        started: Started,
        settings: Settings,
        model: str,
        *,
        prefix_store: PrefixStore | None = None,
        marks: RoleMarks | str = "its chat template was not read",
        engine: int = 0,
    ) -> None:
        """Start with no request in flight; compile the rules, open the event log if there is one.

        Args:
            started: the first watch list.
            settings: the operator's.
            model: name that the model is served under.
            prefix_store: for the prefix cache, if vLLM has one.
            marks: how the chat template delimits messages, or why that is not known.
            engine: index of the engine core among those of the server.

        Raises:
            RolesError: a policy's scope is a role, and the template does not delimit roles.
        """
        check_roles(started.watchlist, marks)
        if isinstance(marks, str) and started.watchlist.rules.of_output:
            log.info("saeguard sees an answer that a request has continued as prompt", reason=marks)
        warn_if_slow()
        warm_up(started.watchlist)
        self.marks = marks
        self.settings = settings
        self.model = model
        self.prefix_store = prefix_store
        self.access = access_of(settings)
        self.columns = started.columns
        self.manifest = started.manifest
        self.may_enforce = frozenset(settings.request_may_enforce)
        ever = self.access.ever_enforced(p.id for p in started.watchlist.policies)
        self.readings = Readings() if settings.read else None
        self.versions = Versions(
            make_version(
                0,
                started.watchlist,
                started.reads,
                may_enforce=self.may_enforce | ever,
                prefix_store=prefix_store,
                readings=self.readings,
            )
        )
        self.updates = UpdateQueue()
        self.reloader: Reloader | None = None
        self.telemetry = Telemetry(settings, model, engine)
        self.requests: dict[str, Any] = {}
        self.passes = PendingPasses(self.versions, self.requests, started.watchlist.digest)
        self.admitted: dict[str, Admission] = {}
        self.departed: dict[str, Any] = {}
        """Requests that ended before all their forward passes were judged. Their rows are still
        recorded, since other requests may read their KV."""
        self.self_test: dict[str, Coverage] = {}
        """Coverage of the self-test's requests that have ended."""
        self.closed = False
        self._roles: dict[str, np.ndarray] = {}
        """Roles of prompt tokens, of requests that no worker update has named yet."""

    @property
    def watchlist(self) -> WatchList:
        """Return the current watch list; requests in flight may be judged by an earlier one."""
        return self.versions.current.watchlist

    # --- a request comes ------------------------------------------------------------------------

    def admission(self, sampling_params: Any, lora_request: Any) -> Admission:
        """Decide which policies judge an arriving request; any thread may call this."""
        extra = getattr(sampling_params, "extra_args", None) or {}
        tenant, asked = extra.get(TENANT), extra.get(ENFORCE)
        return self.decide(
            None if tenant is None else str(tenant),
            None if lora_request is None else lora_request.lora_name,
            None if asked is None else str(asked),
        )

    def decide(self, tenant: str | None, adapter: str | None, asked: str | None) -> Admission:
        """Decide about a request by its tenant, LoRA adapter, and policies that it asks for."""
        return admission_of(
            self.versions.pin(),
            self.access,
            tenant=tenant,
            model=adapter or self.model,
            asked=frozenset(asked.split(",")) if asked else frozenset(),
            may_enforce=self.may_enforce,
            today=datetime.now(UTC).date(),
        )

    def admit(self, request: Any, admission: Admission | None) -> None:
        """Enter a request into the ledger, before the scheduler computes any token of it."""
        request_id = request.request_id
        if request_id in self.requests:
            return
        if admission is None:
            admission = self.admission(request.sampling_params, request.lora_request)
        self.requests[request_id] = request
        self.admitted[request_id] = admission
        if self.readings is not None:
            self.readings.admit(request_id)
        roles = prompt_roles(request, self.marks, admission.pin.version.watchlist.rules)
        if roles is not None and admission.enforced:
            self._roles[request_id] = roles
        admission.pin.version.ledger.admit(
            request_id,
            request.num_prompt_tokens,
            keys=request.block_hashes,
            enforced=admission.decision.enforced,
            roles=roles,
        )

    def worker_update(self, new_requests: Iterable[str]) -> WorkerUpdate:
        """Return the worker update for the step that was just scheduled."""
        known = ((r, self.admitted.get(r)) for r in new_requests)
        return self.updates.take(
            {
                r: Admitted(a.clamps, a.enforced, self._roles.pop(r, None))
                for r, a in known
                if a is not None
            }
        )

    def recomputes(self, request: Any, cached_tokens: int) -> bool:
        """Return whether a request must compute cached tokens again, so that the taps read them.

        Args:
            request: vLLM's.
            cached_tokens: leading tokens whose KV is in the prefix cache or comes from elsewhere.
        """
        admission = self.admitted.get(request.request_id)
        if admission is None or not (admission.recomputes or self.readings is not None):
            return False
        store = self.versions[request.request_id].ledger.prefix_store
        if store is None or cached_tokens % store.block:  # records are of whole blocks
            return True
        return not store.holds(request.block_hashes[: cached_tokens // store.block])

    # --- a request ends -------------------------------------------------------------------------

    def finish(self, request_id: str, reason: str) -> Mapping[str, Any] | None:
        """End a request: write its events, return the `saeguard` object of its response."""
        request = self.requests.pop(request_id, None)
        if request is None:
            return None
        self.passes.catch_up()
        self.passes.stopping.pop(request_id, None)
        admission = self.admitted.pop(request_id)
        self._roles.pop(request_id, None)
        ledger = admission.pin.version.ledger
        # Rows may be scheduled and not judged yet; others may read the KV that these rows leave.
        more = reason in EARLY or ledger.next_position(request_id) < request.num_computed_tokens
        verdicts = self._verdicts(request, admission, forget=not more)
        coverage = verdicts.coverage
        if more:
            self.departed[request_id] = request
        if request_id.startswith(SELF_TEST):
            self.self_test[request_id] = coverage
            return None
        digest = admission.pin.version.watchlist.digest
        about = {"request_id": request_id, "watchlist": digest, "tenant": admission.tenant}
        self.telemetry.request_ended(verdicts, coverage, reason, about)
        if self.readings is not None:
            reading = self.readings.pop(request_id, request.num_prompt_tokens)
            return reading_response(reading, digest)
        stopped = str(request.stop_reason)
        return response(
            verdicts,
            coverage_record(coverage),
            digest,
            request_id=request_id,
            stop_reason=stopped if stopped.startswith(STOP_REASON) else None,
        )

    def response_so_far(self, request_id: str) -> Mapping[str, Any] | None:
        """Return the response as of now, for requests that the API server may end on its own."""
        request = self.requests.get(request_id)
        if request is None:
            return None
        admission = self.admitted[request_id]
        verdicts = self._verdicts(request, admission, forget=False)
        coverage = coverage_record(verdicts.coverage)
        digest = admission.pin.version.watchlist.digest
        return response(verdicts, coverage, digest, request_id=request_id)

    def _verdicts(self, request: Any, admission: Admission, *, forget: bool) -> Verdicts:
        ledger = admission.pin.version.ledger
        found = ledger.finish(request.request_id, request.num_tokens, forget=forget)
        return found.decided(admission.which, admission.decision.waived)

    def release(self, request_ids: Iterable[str]) -> None:
        """Forget departed requests; no forward pass with them is under way any more."""
        for request_id in [r for r in request_ids if r in self.departed]:
            del self.departed[request_id]
            self.versions[request_id].ledger.forget(request_id)

    def changed_totals(self, *, at_once: bool = False) -> list[list[Any]]:
        """Return the changes of the running totals, for the API server's metrics.

        Any thread may call this.

        Args:
            at_once: also if they were reported a moment ago and requests are in flight.
        """
        return self.telemetry.changed_totals(
            busy=bool(self.requests) and not at_once,
            unread_passes=self.passes.lost + self.versions.unwatched_passes,
            dropped=None if self.prefix_store is None else self.prefix_store.dropped,
            reloads=None if self.reloader is None else self.reloader.status,
            watchlist=self.watchlist,
            ever_enforced=lambda ids: self.may_enforce | self.access.ever_enforced(ids),
        )

    def close(self) -> None:
        """End the requests in flight, and write the events that are still queued."""
        self.closed = True
        if self.reloader is not None:
            self.reloader.close()
        for request_id in list(self.requests):
            self.finish(request_id, "shutdown")
        self.telemetry.close()
