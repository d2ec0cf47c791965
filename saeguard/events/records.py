"""Turn verdicts into plain records: for the event log, for responses and for `saeguard scan`.

Event lines have the schema `saeguard.event/v2`, which `record_schema` describes. No record holds
prompt, output or token text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

SCHEMA = "saeguard.event/v2"


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


def verdict_event(
    verdict: Any,
    *,
    request_id: str,
    model: str,
    watchlist: str,
    finished: str | None,
    tenant: str | None = None,
) -> Mapping[str, Any]:
    """Return the event of one verdict on one request."""
    return {
        "event": "verdict",
        "schema": SCHEMA,
        "request_id": request_id,
        "model": model,
        "tenant": tenant,
        "watchlist": watchlist,
        **verdict_record(verdict),
        "finished": finished,
    }


def verdict_events(verdicts: Iterable[Any], **request: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the event of each of a request's verdicts; see `verdict_event` for the arguments."""
    return (verdict_event(verdict, **request) for verdict in verdicts)


def mismatch_event(
    coverage: Any,
    *,
    request_id: str,
    model: str,
    watchlist: str,
    finished: str,
    tenant: str | None = None,
) -> Mapping[str, Any]:
    """Return the event of a request whose coverage does not add up, a fault of the guard."""
    return {
        "event": "ledger_mismatch",
        "schema": SCHEMA,
        "request_id": request_id,
        "model": model,
        "tenant": tenant,
        "watchlist": watchlist,
        "coverage": coverage_record(coverage),
        "finished": finished,
    }


def reload_event(report: Mapping[str, Any], *, model: str) -> Mapping[str, Any]:
    """Return the event of one `saeguard.reload.reloader.Report`, given as a mapping."""
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
