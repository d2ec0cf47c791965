"""One event per request and policy, `saeguard.event/v1`. No prompt, output or token text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

SCHEMA = "saeguard.event/v1"


def verdict_event(
    verdict: Any,
    *,
    request_id: str,
    model: str,
    watchlist: str,
    finished: str | None,
    tenant: str | None = None,
) -> Mapping[str, Any]:
    """Return the event of one `saeguard.guard.verdict.Verdict`."""
    return {
        "event": "verdict",
        "schema": SCHEMA,
        "request_id": request_id,
        "model": model,
        "tenant": tenant,
        "watchlist": watchlist,
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
        "coverage": {
            "tokens": verdict.coverage.tokens,
            "evaluated": verdict.coverage.evaluated,
            "skipped": dict(verdict.coverage.skipped),
        },
        "exception": verdict.exception,
        "error": verdict.error,
        "approximate": verdict.approximate,
        "finished": finished,
    }


def verdict_events(verdicts: Iterable[Any], **known: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the event of each of a request's verdicts; see `verdict_event`."""
    return (verdict_event(verdict, **known) for verdict in verdicts)


def mismatch_event(
    coverage: Mapping[str, Any],
    *,
    request_id: str,
    model: str,
    watchlist: str,
    finished: str,
    tenant: str | None = None,
) -> Mapping[str, Any]:
    """Return the event of a request whose tokens are not all accounted for: a fault of ours."""
    return {
        "event": "ledger_mismatch",
        "schema": SCHEMA,
        "request_id": request_id,
        "model": model,
        "tenant": tenant,
        "watchlist": watchlist,
        "coverage": coverage,
        "finished": finished,
    }


def reload_event(report: Mapping[str, Any], *, model: str) -> Mapping[str, Any]:
    """Return the event of one `saeguard.reload.reloader.Report`."""
    return {"event": "policy.reload", "schema": SCHEMA, "model": model, **report}


def refusal_event(reason: str, *, model: str, tenant: str | None) -> Mapping[str, Any]:
    """Return the event of a request that asked the guard for what it may not have."""
    return {
        "event": "request.refused",
        "schema": SCHEMA,
        "model": model,
        "tenant": tenant,
        "reason": reason,
    }
