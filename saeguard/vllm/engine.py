"""The engine core's side of the guard: rules, verdicts, events, and what the response says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import structlog

from saeguard.events.event import verdict_event
from saeguard.events.sink import Sink
from saeguard.guard.ledger import Ledger, as_dict, balanced
from saeguard.guard.packet import Packet
from saeguard.guard.verdict import Coverage, Verdict
from saeguard.guard.watchlist import WatchList
from saeguard.vllm.config import Settings
from saeguard.vllm.selftest import PREFIX as SELF_TEST
from saeguard.vllm.worker import enforced_by_request

log = structlog.get_logger("saeguard")

VISIBLE = frozenset({"flag", "clamp", "stop"})
"""Actions that the application sees; `log` and shadow verdicts are the operator's."""


PASSES = 16
"""Passes judged together, unless a request ends before."""


class PacketError(RuntimeError):
    """The model's process runs another watch list than the engine core."""


class EngineGuard:
    """Judges the requests of one engine core."""

    def __init__(self, watchlist: WatchList, settings: Settings, model: str) -> None:
        """Start with no request in flight; open the event log if there is to be one."""
        self.watchlist = watchlist
        self.settings = settings
        self.model = model
        self.ledger = Ledger(watchlist)
        self.requests: dict[str, Any] = {}
        self.sink = (
            Sink(Path(settings.events), capacity=settings.event_queue) if settings.events else None
        )
        self.unread_steps = 0
        self.self_test: dict[str, Coverage] = {}
        self._waiting: list[tuple[Packet, np.ndarray]] = []

    def admit(self, request: Any) -> None:
        """Start the account of a request that enters the scheduler."""
        if request.request_id not in self.requests:
            self.requests[request.request_id] = request
            self.ledger.admit(
                request.request_id,
                request.num_prompt_tokens,
                enforced_by_request(request.sampling_params),
            )

    def valid_rows(self, packet: Packet, scheduler: Any, scheduled: Any, output: Any) -> np.ndarray:
        """Return [requests] leading rows that count, before the scheduler looks at its output.

        Args:
            packet: what the pass saw.
            scheduler: vLLM's scheduler, for the requests and their state.
            scheduled: the `SchedulerOutput` of the pass.
            output: its `ModelRunnerOutput`.

        Raises:
            PacketError: worker and engine core disagree about the watch list.
        """
        if packet.watchlist != self.watchlist.digest:
            raise PacketError(
                f"saeguard: the worker watches {packet.watchlist[:12]}, the engine core "
                f"{self.watchlist.digest[:12]}: policy files changed during start-up; start again"
            )
        valid = np.diff(packet.query_start)
        drafts = scheduled.scheduled_spec_decode_tokens
        for i, request_id in enumerate(packet.request_ids):
            request = scheduler.requests.get(request_id)
            if request is None or request.is_finished() or _stale(request):
                valid[i] = 0
                continue
            if drafts and request_id in drafts:
                sampled = output.sampled_token_ids[output.req_id_to_index[request_id]]
                if sampled:
                    valid[i] -= len(drafts[request_id]) - (len(sampled) - 1)
        return valid

    def ingest(self, packet: Packet, valid: np.ndarray) -> None:
        """Take in one pass, after the scheduler has looked at its output.

        No action of this version needs a verdict in the step that made it: clamps decide on the
        device. So passes wait for a few others and are judged together, while the rules' code
        and state are warm, which costs a fraction of coming back to them after every forward.

        Where a request ended within its accepted drafts, those behind its end are no part of it.
        """
        firsts = packet.positions[packet.query_start[:-1]]
        for i in np.flatnonzero(valid > 1):
            request = self.requests.get(packet.request_ids[i])
            if request is not None:
                valid[i] = min(valid[i], max(0, request.num_tokens - int(firsts[i])))
        self._waiting.append((packet, valid))
        if len(self._waiting) >= PASSES:
            self.catch_up()

    def catch_up(self) -> None:
        """Judge the passes that wait."""
        for packet, valid in self._waiting:
            self.ledger.ingest(packet, valid)
        self._waiting.clear()

    def finish(self, request_id: str, reason: str) -> Mapping[str, Any] | None:
        """End a request: write its events, return what the response says."""
        request = self.requests.pop(request_id, None)
        if request is None:
            return None
        self.catch_up()
        coverage = self.ledger.coverage(request_id, request.num_tokens)
        verdicts = self.ledger.finish(request_id, request.num_tokens)
        if request_id.startswith(SELF_TEST):
            self.self_test[request_id] = coverage
            return None
        if not balanced(coverage):
            log.error(
                "saeguard ledger does not balance", request_id=request_id, **as_dict(coverage)
            )
        if self.sink is not None:
            for verdict in verdicts:
                self.sink.put(
                    partial(
                        verdict_event,
                        verdict,
                        request_id=request_id,
                        model=self.model,
                        watchlist=self.watchlist.digest,
                        finished=reason,
                    )
                )
        return response(verdicts, as_dict(coverage), self.watchlist.digest)

    def so_far(self, request_id: str) -> Mapping[str, Any] | None:
        """Return what the response would say now, for stops that only the API server sees."""
        request = self.requests.get(request_id)
        if request is None:
            return None
        self.catch_up()
        verdicts = self.ledger.finish(request_id, request.num_tokens, forget=False)
        coverage = self.ledger.coverage(request_id, request.num_tokens)
        return response(verdicts, as_dict(coverage), self.watchlist.digest)

    def clamped_by(self, sampling_params: Any) -> tuple[str, ...]:
        """Return the policies that may edit a request's activations, for its cache key."""
        wanted = enforced_by_request(sampling_params)
        return tuple(
            f"{p.id} {p.digest}"
            for p in self.watchlist.policies
            if p.action == "clamp"
            and (
                p.mode == "enforce"
                or (p.id in wanted and p.id in self.settings.request_may_enforce)
            )
        )

    def close(self) -> None:
        """Write the events that are still queued."""
        for request_id in list(self.requests):
            self.finish(request_id, "shutdown")
        if self.sink is not None:
            self.sink.close()


def _stale(request: Any) -> bool:
    return bool(request.num_stale_output_tokens > 0 and request.drop_stale_output)


def response(
    verdicts: Sequence[Verdict], coverage: Mapping[str, Any], watchlist: str
) -> Mapping[str, Any]:
    """Return the `saeguard` object of a response: acting verdicts that the client may see."""
    shown = [v for v in verdicts if v.acted in VISIBLE]
    order = ["log", "flag", "clamp", "stop"]
    strongest = max((order.index(v.acted) for v in shown if v.acted), default=-1)
    errors = sum(v.outcome == "error" for v in verdicts)
    return {
        "flagged": bool(shown),
        "action": order[strongest] if shown else None,
        "verdicts": [
            {
                "policy": v.policy,
                "severity": v.severity,
                "action": v.acted,
                "score": v.score,
                "threshold": 1.0,
                "first_token": v.first_token,
                "matched_tokens": v.matched_tokens,
                "features": {
                    name: {"count": f.count, "max": round(f.max, 4), "at": f.at}
                    for name, f in v.features.items()
                },
                "coverage": as_dict(v.coverage),
            }
            for v in shown
        ],
        "coverage": coverage,
        "policies": len(verdicts),
        "errors": errors,
        "watchlist": watchlist[:12],
    }
