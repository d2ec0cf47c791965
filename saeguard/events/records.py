"""Turn verdicts into plain records: for the event log, for responses and for `saeguard scan`.

Event lines have the schema `saeguard.event/v3`, which `record_schema` describes. A request leaves
one line of its own, and one for each verdict that is a match or an error; with `event_lines: all`,
one for each verdict. No record holds prompt, output or token text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

SCHEMA = "saeguard.event/v3"


def verdict_record(verdict: Any) -> dict[str, Any]:
    """Return one `saeguard.guard.verdict.Verdict` as every output shows it, whole or in part."""
    return {
        "policy": verdict.policy,
        "policy_digest": verdict.digest,
        "mode": verdict.mode,
        "severity": verdict.severity,
        "verdict": verdict.outcome,
        "action": verdict.action,
        "acted": verdict.acted,
        "score": verdict.score,
        "threshold": 1.0,
        "first_token": verdict.first_token,
        "matched_tokens": verdict.matched_tokens,
        "features": {
            name: {"count": f.count, "max": round(f.max, 6), "at": f.at}
            for name, f in verdict.features.items()
        },
        "coverage": coverage_record(verdict.coverage),
        "exception": verdict.exception,
        "error": verdict.error,
        "approximate": verdict.approximate,
    }


def coverage_record(coverage: Any) -> dict[str, Any]:
    """Return one `saeguard.guard.verdict.Coverage` as every output shows it."""
    return {
        "tokens": coverage.tokens,
        "evaluated": coverage.evaluated,
        "skipped": dict(coverage.skipped),
    }


def of_request(
    event: str, *, request_id: str, model: str, watchlist: str, tenant: str | None = None
) -> dict[str, Any]:
    """Return the fields with which every event about a request begins."""
    return {
        "event": event,
        "schema": SCHEMA,
        "request_id": request_id,
        "model": model,
        "tenant": tenant,
        "watchlist": watchlist,
    }


def verdict_event(verdict: Any, *, finished: str | None, **request: Any) -> Mapping[str, Any]:
    """Return the event of one verdict on one request; for `request` see `of_request`."""
    return {**of_request("verdict", **request), **verdict_record(verdict), "finished": finished}


def request_event(verdicts: Any, *, finished: str, **request: Any) -> Mapping[str, Any]:
    """Return the event of a request: its `guard.request_verdicts.Verdicts`, counted."""
    begin = of_request("request", **request)
    return {
        **begin,
        "watchlist": begin["watchlist"][:12],  # every request leaves this line
        "policies": len(verdicts),
        "verdicts": verdicts.outcomes(),
        "coverage": coverage_record(verdicts.coverage),
        "finished": finished,
    }


def ended_events(
    verdicts: Any, policies: Iterable[int] | None, **request: Any
) -> Iterator[Mapping[str, Any]]:
    """Yield the events of a request that ended: those of verdicts, then its own.

    Args:
        verdicts: the request's `guard.request_verdicts.Verdicts`.
        policies: those whose verdicts have an event; None for all.
        request: `finished`, and what `of_request` takes.
    """
    found = verdicts if policies is None else map(verdicts.of_policy, policies)
    for verdict in found:
        yield verdict_event(verdict, **request)
    yield request_event(verdicts, **request)


def mismatch_event(coverage: Any, *, finished: str, **request: Any) -> Mapping[str, Any]:
    """Return the event of a request whose coverage does not add up, a fault of the guard."""
    return {
        **of_request("ledger_mismatch", **request),
        "coverage": coverage_record(coverage),
        "finished": finished,
    }


def reload_event(report: Mapping[str, Any], *, model: str) -> Mapping[str, Any]:
    """Return the event of one `saeguard.reload.reload_state.Report`, given as a flat mapping."""
    return {"event": "policy.reload", "schema": SCHEMA, "model": model, **report}


def refusal_event(reason: str, *, model: str, tenant: str | None) -> Mapping[str, Any]:
    """Return the event of a request that was refused for what it asked of the guard."""
    return {
        "event": "request.refused",
        "schema": SCHEMA,
        "model": model,
        "tenant": tenant,
        "reason": reason,
    }
