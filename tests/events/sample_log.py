"""An event log of two hours: a rotated file of schema v2, and the file of today's schema."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

V2, V3 = "saeguard.event/v2", "saeguard.event/v3"
OLD, NEW = "0" * 64, "1" * 64
POLICIES = {"code.secret": ("enforce", "stop"), "code.shell": ("shadow", "flag")}
TENANTS = ("bank", "shop", None)


def verdict(schema: str, number: int, policy: str, outcome: str, minute: int) -> dict[str, Any]:
    """Return the line of one verdict."""
    mode, action = POLICIES[policy]
    matched = outcome == "match"
    seen = 0 if outcome == "not_evaluated" else 20
    share = 0.9 + number / 100 if matched else 0.2
    skipped = {"not_forwarded": 1} if seen else {"not_forwarded": 1, "prefix_cached": 20}
    return {
        "event": "verdict", "schema": schema, **about(number, minute),
        "watchlist": OLD if minute < 60 else NEW,
        "policy": policy, "policy_digest": policy.encode().hex().ljust(64, "0")[:64], "mode": mode,
        "severity": "high", "verdict": outcome, "action": action,
        "acted": action if matched and mode == "enforce" else None,
        "score": share / 0.6 if seen else None, "threshold": 1.0,
        "first_token": 12 if matched else None, "matched_tokens": 2 if matched else 0,
        "features": {
            "secret" if policy == "code.secret" else "shell_exec": {
                "count": 2 if matched else 0, "max": round(share, 6), "at": 12
            }
        } if seen else {},
        "coverage": {"tokens": 21, "evaluated": seen, "skipped": skipped},
        "exception": None, "error": None, "approximate": False,
        "finished": "stop" if number % 2 else "length",
    }  # fmt: skip


def about(number: int, minute: int) -> dict[str, Any]:
    """Return the keys that every line of a request has."""
    return {
        "time": f"2026-11-29T{8 + minute // 60:02}:{minute % 60:02}:00Z",
        "request_id": f"chatcmpl-{number:04}-0a1b2c3d",
        "model": "demo",
        "tenant": TENANTS[number % 3],
    }


def outcomes(number: int) -> dict[str, str]:
    """Return what each policy concluded of a request."""
    if number % 8 == 0:
        return dict.fromkeys(POLICIES, "not_evaluated")
    return {
        "code.secret": "match" if number % 5 == 0 else "no_match",
        "code.shell": "match" if number % 3 == 0 else "no_match",
    }


def old_lines() -> Iterator[dict[str, Any]]:
    """Yield a line for each verdict on requests 1 to 20."""
    for number in range(1, 21):
        for policy, outcome in outcomes(number).items():
            yield verdict(V2, number, policy, outcome, minute=number)


def new_lines() -> Iterator[dict[str, Any]]:
    """Yield a line for each match of requests 21 to 40, one for each request, and others."""
    line = {"schema": V3, "model": "demo"}
    yield {
        "event": "policy.reload", **line, "time": "2026-11-29T09:00:00Z", "outcome": "active",
        "trigger": "files", "old": OLD, "new": NEW, "error": None, "policies": 2, "revision": None,
        "read_ms": 12.1, "swap_ms": 0.8, "encoder_rows": 1, "came": ["code.shell"],
        "vanished": ["code.sql"], "changed": ["code.secret"], "feature_sets": [],
        "no_longer_enforced": ["code.sql"],
    }  # fmt: skip
    for number in range(21, 41):
        found, minute = outcomes(number), 40 + number
        for policy, outcome in found.items():
            if outcome == "match":
                yield verdict(V3, number, policy, outcome, minute)
        counts = {o: list(found.values()).count(o) for o in found.values()}
        whole = verdict(V3, number, "code.secret", next(iter(found.values())), minute)["coverage"]
        yield {
            "event": "request", "schema": V3, **about(number, minute), "watchlist": NEW[:12],
            "policies": 2, "verdicts": counts, "coverage": whole,
            "finished": "stop" if number % 2 else "length",
        }  # fmt: skip
    yield {
        "event": "request.refused", **line, "time": "2026-11-29T09:30:00Z", "tenant": "shop",
        "reason": "saeguard_enforce: code.shell may not be enforced for this request",
    }  # fmt: skip


def text_of(lines: Iterator[dict[str, Any]]) -> str:
    """Return lines as a log holds them."""
    return "".join(f"{json.dumps(line)}\n" for line in lines)


def write_sample(folder: Path) -> Path:
    """Write the log and its rotated file, and return its path."""
    path = folder / "events.jsonl"
    path.write_text(text_of(new_lines()))
    with gzip.open(folder / "events.jsonl.1.gz", "wt") as file:
        file.write(text_of(old_lines()))
    return path
