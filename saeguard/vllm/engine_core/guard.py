"""The engine core's side of the guard: rules, verdicts, events, and what the response says."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import structlog

from saeguard.errors import CannotRunError
from saeguard.events.metrics import Counts
from saeguard.events.records import (
    coverage_record,
    mismatch_event,
    reload_event,
    verdict_events,
    verdict_record,
)
from saeguard.events.sink import Sink
from saeguard.guard.forward_pass import ForwardPass
from saeguard.guard.hits import Hit
from saeguard.guard.prefix.store import PrefixStore
from saeguard.guard.request_verdicts import Verdicts
from saeguard.guard.roles.assign import RoleMarks, check_roles, roles_of
from saeguard.guard.scopes import USER
from saeguard.guard.state import State
from saeguard.guard.verdict import Coverage, balanced
from saeguard.guard.watchlist import WatchList
from saeguard.policy.types import strongest_action
from saeguard.reload.reloader import Reloader, Report
from saeguard.reload.versions import Versions, make_version
from saeguard.reload.worker_updates import Admitted, UpdateQueue, WorkerUpdate
from saeguard.vllm.engine_core.admission import ATTRIBUTE, ENFORCE, TENANT, Admission, admission_of
from saeguard.vllm.selftest import PREFIX as SELF_TEST
from saeguard.vllm.settings import Settings, Started, access_of

log = structlog.get_logger("saeguard")

VISIBLE = frozenset({"flag", "clamp", "stop"})
"""Actions that the application sees; `log` and shadow verdicts are the operator's."""
SHOWN_TO_CLIENTS = frozenset(
    {"policy", "severity", "score", "threshold", "first_token", "matched_tokens", "approximate",
     "features", "coverage"}
)  # fmt: skip
"""Keys of a verdict's record that a response holds, besides `action`: the action taken."""

EARLY = frozenset({"abort", "error"})
"""Reasons for which a request ends with passes of it still under way."""

MESSAGE = "message"
"""Key of what the client reads in place of the text of a request that was stopped."""

TELL_S = 1.0
"""How long running totals wait, at most, while requests are under way."""

PASSES = 16
"""Passes judged together, unless a request ends before."""


class ForwardPassError(CannotRunError):
    """The model's process runs another watch list than the engine core."""


class Stop(NamedTuple):
    """Why a request ends, and how much of it stays."""

    policy: str
    tokens: int
    """Tokens that stay: up to the one that fired, which the client has already."""
    error: bool


class EngineGuard:
    """Judges the requests of one engine core."""

    def __init__(
        self,
        started: Started,
        settings: Settings,
        model: str,
        *,
        prefix_store: PrefixStore | None = None,
        marks: RoleMarks | str = "nobody has looked at the chat template",
    ) -> None:
        """Start with no request in flight; open the event log if there is to be one.

        Args:
            started: the first list.
            settings: the operator's.
            model: name that it is served under.
            prefix_store: of cached prefixes.
            marks: how the chat template sets turns apart, or why that cannot be told.

        Raises:
            RolesError: a policy's scope is a role, and roles cannot be told.
        """
        check_roles(started.watchlist, marks)
        self.marks = marks
        self._roles: dict[str, np.ndarray] = {}
        """Of requests whose workers have not been told of them."""
        self.settings = settings
        self.model = model
        self.prefix_store = prefix_store
        self.access = access_of(settings)
        self.columns = started.columns
        self.manifest = started.manifest
        self.first = started.watchlist.digest
        """Digest of the list that the workers were started with."""
        self.may_enforce = frozenset(settings.request_may_enforce)
        ever = self.access.ever_enforced(p.id for p in started.watchlist.policies)
        self.ledger = Versions(
            make_version(
                0,
                started.watchlist,
                started.reads,
                may_enforce=self.may_enforce | ever,
                prefix_store=prefix_store,
            )
        )
        self.updates = UpdateQueue()
        self.reloader: Reloader | None = None
        self.requests: dict[str, Any] = {}
        self.admitted: dict[str, Admission] = {}
        self.departed: dict[str, Any] = {}
        """Requests ended before their passes were through: others may read their KV."""
        self.stopping: dict[str, Stop] = {}
        self.sink = (
            Sink(Path(settings.events), capacity=settings.event_queue) if settings.events else None
        )
        self.counts = Counts()
        self.lost = 0
        """Passes of which no packet came."""
        self.self_test: dict[str, Coverage] = {}
        self._waiting: list[tuple[ForwardPass, np.ndarray, frozenset[str]]] = []
        self._saved: list[tuple[int, State]] = []
        self._told = -TELL_S
        """When running totals were told last."""
        self._at_once = False
        """Whether the pass now must be judged before the scheduler looks at it."""

    @property
    def watchlist(self) -> WatchList:
        """Return the present list; requests under way may have begun with another."""
        return self.ledger.current.watchlist

    # --- requests come --------------------------------------------------------------------------

    def welcome(self, sampling_params: Any, lora_request: Any) -> Admission:
        """Settle which policies judge a request that is on its way in; from any thread."""
        pin = self.ledger.pin()
        extra = getattr(sampling_params, "extra_args", None) or {}
        tenant = extra.get(TENANT)
        asked = extra.get(ENFORCE)
        return admission_of(
            pin,
            self.access,
            tenant=None if tenant is None else str(tenant),
            model=self.model if lora_request is None else lora_request.lora_name,
            asked=frozenset(str(asked).split(",")) if asked else frozenset(),
            may_enforce=self.may_enforce,
            today=datetime.now(UTC).date(),
        )

    def admit(self, request: Any) -> None:
        """Start the account of a request that enters the scheduler."""
        request_id = request.request_id
        if request_id in self.requests:
            return
        admission = getattr(request, ATTRIBUTE, None)
        if admission is None:
            admission = self.welcome(request.sampling_params, request.lora_request)
        self.requests[request_id] = request
        self.admitted[request_id] = admission
        roles = self._roles_of(request, admission.pin.version.watchlist)
        if roles is not None and admission.enforced:
            self._roles[request_id] = roles
        self.ledger.admit(
            request_id,
            request.num_prompt_tokens,
            request.block_hashes,
            pin=admission.pin,
            enforced=admission.decision.enforced,
            roles=roles,
        )

    def _roles_of(self, request: Any, watchlist: WatchList) -> np.ndarray | None:
        """Return whose turn each prompt token is in, None where no policy asks.

        A prompt of embeddings has no marks of a template: it is the user's, as any text is that
        does not go through one.
        """
        if not watchlist.rules.by_role:
            return None
        assert isinstance(self.marks, RoleMarks)  # checked before the list was taken
        if request.prompt_token_ids is None:
            return np.full(request.num_prompt_tokens, USER, np.uint8)
        return roles_of(self.marks, np.asarray(request.prompt_token_ids))

    def worker_update(self, new_requests: Iterable[str]) -> WorkerUpdate:
        """Return what the workers are told with the pass that was just laid out."""
        known = ((r, self.admitted.get(r)) for r in new_requests)
        return self.updates.take(
            {
                r: Admitted(a.clamps, a.enforced, self._roles.pop(r, None))
                for r, a in known
                if a is not None
            }
        )

    # --- one step -------------------------------------------------------------------------------

    def before_update(self, forward_pass: ForwardPass, scheduled: Any, output: Any) -> None:
        """Take in a pass before the scheduler looks at its output; find what must stop in it.

        Args:
            forward_pass: what the pass saw.
            scheduled: the `SchedulerOutput` of the pass.
            output: its `ModelRunnerOutput`.

        Raises:
            PacketError: worker and engine core disagree about the watch list.
        """
        if forward_pass.watchlist != self.first:
            raise ForwardPassError(
                f"saeguard: the worker watches {forward_pass.watchlist[:12]}, the engine core "
                f"{self.first[:12]}: policy files changed during start-up; start again"
            )
        valid = self._valid_rows(forward_pass, scheduled, output)
        entering = frozenset(
            {
                *(new.req_id for new in scheduled.scheduled_new_reqs),
                *scheduled.scheduled_cached_reqs.resumed_req_ids,
            }
        )
        self._waiting.append((forward_pass, valid, entering))
        self._at_once = any(version.can_stop for version in self.ledger.live)
        if self._at_once:
            if scheduled.scheduled_spec_decode_tokens:  # the request may end within its drafts
                self._saved = [
                    (i, self.ledger.save(forward_pass.request_ids[i]))
                    for i in np.flatnonzero(valid > 1)
                    if forward_pass.request_ids[i] in scheduled.scheduled_spec_decode_tokens
                ]
            self.catch_up()

    def after_update(self, forward_pass: ForwardPass) -> None:
        """Correct what is known of the pass now: where a request ended within its drafts.

        Without a policy that stops, no action needs a verdict in the step that made it: clamps
        decide on the device. So passes wait for a few others and are judged together, while the
        rules' code and state are warm, which costs a fraction of coming back to them after
        every forward.
        """
        firsts = forward_pass.positions[forward_pass.query_start[:-1]]
        if self._at_once:
            for i, state in self._saved:
                request_id = forward_pass.request_ids[i]
                request = self.requests.get(request_id)  # None: its client left in mid-step
                if request is not None and self.ledger.seen(request_id) > request.num_tokens:
                    self.ledger.restore(request_id, state)
                    again = np.zeros(len(firsts), np.int64)
                    again[i] = request.num_tokens - int(firsts[i])
                    self.ledger.ingest(forward_pass, again, ())
            self._saved = []
            return
        if not self._waiting:  # a request that ended in error within the update had it judged
            return
        valid = self._waiting[-1][1]
        for i in np.flatnonzero(valid > 1):
            request = self.requests.get(forward_pass.request_ids[i])
            if request is not None:
                valid[i] = min(valid[i], max(0, request.num_tokens - int(firsts[i])))
        if len(self._waiting) >= PASSES:
            self.catch_up()

    def _valid_rows(self, forward_pass: ForwardPass, scheduled: Any, output: Any) -> np.ndarray:
        """Return [requests] leading rows that count.

        Rows hold a request's tokens as far as these are known. Behind them lie drafts, of which
        the accepted ones count, and under asynchronous scheduling a token whose sampling was
        taken back by a preemption.
        """
        valid = np.diff(forward_pass.query_start)
        drafts = scheduled.scheduled_spec_decode_tokens
        for i, request_id in enumerate(forward_pass.request_ids):
            request = self.requests.get(request_id) or self.departed.get(request_id)
            if request is None:
                valid[i] = 0
                continue
            first = int(forward_pass.positions[forward_pass.query_start[i]])
            accepted = 0
            if drafts and request_id in drafts and not _stale(request):
                sampled = output.sampled_token_ids[output.req_id_to_index[request_id]]
                accepted = max(0, len(sampled) - 1)
            valid[i] = np.clip(request.num_tokens + accepted - first, 0, valid[i])
        return valid

    def catch_up(self) -> None:
        """Judge the passes that wait."""
        waiting, self._waiting = self._waiting, []
        for hit in self.ledger.ingest_all(waiting):
            self._consider(hit)

    def _consider(self, hit: Hit) -> None:
        """Note that a request must stop, if the policy says so and is enforced for it."""
        if hit.request_id not in self.requests:
            return
        policy = self.ledger.of(hit.request_id).watchlist.policies[hit.policy]
        if (
            (hit.error or policy.action == "stop")
            and not hit.request_id.startswith(SELF_TEST)
            and self.ledger.enforces(hit.request_id, hit.policy)
        ):
            stop = Stop(policy.id, hit.position + 1, hit.error)
            earlier = self.stopping.get(hit.request_id)
            if earlier is None or stop.tokens < earlier.tokens:
                self.stopping[hit.request_id] = stop

    def lost_pass(self, request_ids: Iterable[str]) -> None:
        """Note a pass of which nothing came; policies with `on_error: stop` end its requests."""
        self.lost += 1
        for request_id in request_ids:
            if request_id in self.requests:
                policies = self.ledger.of(request_id).watchlist.policies
                for i, policy in enumerate(policies):
                    if policy.on_error == "stop":
                        seen = self.requests[request_id].num_tokens
                        self._consider(Hit(request_id, i, seen - 1, error=True))

    def recomputes(self, request: Any, cached_tokens: int) -> bool:
        """Return whether a request must compute cached tokens again, to have them looked at."""
        admission = self.admitted.get(request.request_id)
        if self.prefix_store is None or admission is None or not admission.recomputes:
            return False
        self.catch_up()
        seen = self.ledger.of(request.request_id).ledger.prefix_store
        assert seen is not None
        return not seen.holds(request.block_hashes[: cached_tokens // seen.block])

    # --- the end of a request -------------------------------------------------------------------

    def finish(self, request_id: str, reason: str) -> Mapping[str, Any] | None:
        """End a request: write its events, return what the response says."""
        request = self.requests.pop(request_id, None)
        if request is None:
            return None
        self.catch_up()
        self.stopping.pop(request_id, None)
        admission = self.admitted.pop(request_id)
        self._roles.pop(request_id, None)
        digest = admission.pin.version.watchlist.digest
        coverage = self.ledger.coverage(request_id, request.num_tokens)
        # Rows that are scheduled and not seen yet: others may read the KV that they leave.
        more = reason in EARLY or self.ledger.seen(request_id) < request.num_computed_tokens
        verdicts = self.ledger.finish(request_id, request.num_tokens, forget=not more)
        if more:
            self.departed[request_id] = request
        if request_id.startswith(SELF_TEST):
            self.self_test[request_id] = coverage
            return None
        verdicts = verdicts.decided(admission.decision.applies, admission.decision.waived)
        known = {"request_id": request_id, "model": self.model, "watchlist": digest}
        self._report(verdicts, coverage, reason, {**known, "tenant": admission.tenant})
        return response(verdicts, coverage_record(coverage), digest)

    def _report(
        self,
        verdicts: Verdicts,
        coverage: Coverage,
        reason: str,
        known: Mapping[str, Any],
    ) -> None:
        self.counts.request(verdicts, coverage)
        if not (balanced(coverage) and verdicts.balanced()):
            self.counts.add("ledger_mismatches")
            log.error(
                "saeguard ledger does not balance",
                request_id=known["request_id"],
                **coverage_record(coverage),
            )
            self._put(partial(mismatch_event, coverage, **known, finished=reason))
        if self.sink is not None:
            events = partial(verdict_events, verdicts, **known, finished=reason)
            self.sink.put_all(events, len(verdicts))

    def _put(self, build: Callable[[], Mapping[str, Any]]) -> None:
        if self.sink is not None:
            self.sink.put(build)

    def counted(self) -> list[list[Any]]:
        """Return what moved since the last call, for the API server's metrics.

        With many policies much moves with every request, so while others are under way it is told
        once in `TELL_S`; the last of them tells all.
        """
        now = time.monotonic()
        if self.requests and now - self._told < TELL_S:
            return []
        self._told = now
        if self.sink is not None:
            for state in ("produced", "written", "dropped"):
                self.counts.total("events", state, n=getattr(self.sink, state))
        if self.prefix_store is not None:
            self.counts.total("prefix_store_dropped", n=self.prefix_store.dropped)
        self.counts.total("unread_passes", n=self.lost + self.ledger.unwatched_passes)
        if self.reloader is not None:
            status = self.reloader.status
            for outcome, n in list(status.outcomes.items()):
                self.counts.total("reloads", outcome, n=n)
            self.counts.gauge("policies_current", int(status.current))
        return self.counts.take()

    def release(self, request_ids: Iterable[str]) -> None:
        """Forget departed requests, once no pass with them is under way."""
        gone = [r for r in request_ids if r in self.departed]
        if gone:
            self.catch_up()
        for request_id in gone:
            del self.departed[request_id]
            self.ledger.forget(request_id)

    def so_far(self, request_id: str) -> Mapping[str, Any] | None:
        """Return what the response would say now, for stops that only the API server sees."""
        request = self.requests.get(request_id)
        if request is None:
            return None
        self.catch_up()
        verdicts = self.ledger.finish(request_id, request.num_tokens, forget=False)
        coverage = self.ledger.coverage(request_id, request.num_tokens)
        admission = self.admitted[request_id]
        verdicts = verdicts.decided(admission.decision.applies, admission.decision.waived)
        digest = admission.pin.version.watchlist.digest
        return response(verdicts, coverage_record(coverage), digest)

    def reloaded(self, report: Report) -> None:
        """Tell what became of a reload; from the reloading thread."""
        told = asdict(report)
        (log.info if report.error is None else log.error)("saeguard policy.reload", **told)
        self._put(partial(reload_event, told, model=self.model))

    def close(self) -> None:
        """Write the events that are still queued."""
        if self.reloader is not None:
            self.reloader.close()
        for request_id in list(self.requests):
            self.finish(request_id, "shutdown")
        if self.sink is not None:
            self.sink.close()


def _stale(request: Any) -> bool:
    return bool(request.num_stale_output_tokens > 0 and request.drop_stale_output)


def response(verdicts: Verdicts, coverage: Mapping[str, Any], watchlist: str) -> Mapping[str, Any]:
    """Return the `saeguard` object of a response: acting verdicts that the client may see."""
    shown = [v for v in verdicts.acting() if v.acted in VISIBLE]
    stops = sorted((v.first_token or 0, v.message) for v in shown if v.message is not None)
    return {
        **({MESSAGE: stops[0][1]} if stops else {}),
        "flagged": bool(shown),
        "action": strongest_action(v.acted for v in shown),
        "verdicts": [
            {key: value for key, value in verdict_record(v).items() if key in SHOWN_TO_CLIENTS}
            | {"action": v.acted}
            for v in shown
        ],
        "coverage": coverage,
        "policies": len(verdicts),
        "errors": verdicts.errors(),
        "watchlist": watchlist[:12],
    }
