"""Build the `saeguard` object of a response, and send it to the API server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from saeguard.events.records import verdict_record
from saeguard.guard.readings import Reading
from saeguard.guard.request_verdicts import Verdicts
from saeguard.policy.types import strongest_action
from saeguard.vllm.messages import COUNTS, KEY, MESSAGE, STATE, STOPPED_BY, VALUES
from saeguard.vllm.patches import assumes, reads

VISIBLE = frozenset({"flag", "clamp", "stop"})
"""Actions that responses show; `log` and shadow verdicts are for the operator only."""
SHOWN_TO_CLIENTS = frozenset(
    {
        "policy",
        "severity",
        "score",
        "threshold",
        "first_token",
        "matched_tokens",
        "approximate",
        "features",
        "coverage",
    }
)
"""Keys of a verdict's record that a response shows, besides `action`, the action taken."""

reads(
    "vllm.v1.engine:EngineCoreOutput",
    "kv_transfer_params",
    why="carries the verdicts with the request's own output, so that they reach the API server "
    "that serves the request, whatever the topology",
)
assumes(
    "`kv_transfer_params` of a request's output reach `OutputProcessor` and `RequestState` "
    "unchanged",
    why="verdicts travel in it, and are taken out before anything else reads it",
)


def attach_response(output: Any, response: Mapping[str, Any], counts: list[list[Any]]) -> None:
    """Put a response and changes of the running totals into a request's `EngineCoreOutput`."""
    output.kv_transfer_params = {
        **(output.kv_transfer_params or {}),
        KEY: {**response, COUNTS: counts},
    }


def reading_response(reading: Reading | None, watchlist: str) -> Mapping[str, Any]:
    """Return the `saeguard` object of a text that an offline command reads.

    Args:
        reading: of the text's tokens; None if none was read.
        watchlist: digest of the watch list that was read.
    """
    values, state = (b"", b"") if reading is None else (part.tobytes() for part in reading)
    return {VALUES: values, STATE: state, "watchlist": watchlist}


def response(
    verdicts: Verdicts,
    coverage: Mapping[str, Any],
    watchlist: str,
    *,
    request_id: str,
    stop_reason: str | None = None,
) -> Mapping[str, Any]:
    """Return the `saeguard` object of a response: the acting verdicts that the client may see.

    `flagged` is null if no policy could judge the request, so that nobody takes it for clean.

    Args:
        verdicts: of one request.
        coverage: of the request, as a dictionary.
        watchlist: digest of the watch list that judged it.
        stop_reason: names the policy that stopped it; None if none did.
        request_id: the engine's own, as events hold it.
    """
    errors, unseen = verdicts.errors(), verdicts.outcomes().get("not_evaluated", 0)
    shown = [v for v in verdicts.acting() if v.acted in VISIBLE]
    stops = sorted((v.first_token or 0, v.message) for v in shown if v.message is not None)
    return {
        **({MESSAGE: stops[0][1]} if stops else {}),
        **({} if stop_reason is None else {STOPPED_BY: stop_reason}),
        "flagged": bool(shown) if shown or errors + unseen < len(verdicts) else None,
        "action": strongest_action(v.acted for v in shown),
        "verdicts": [
            {key: value for key, value in verdict_record(v).items() if key in SHOWN_TO_CLIENTS}
            | {"action": v.acted}
            for v in shown
        ],
        "coverage": coverage,
        "policies": len(verdicts),
        "errors": errors,
        "not_evaluated": unseen,
        "watchlist": watchlist[:12],
        "request_id": request_id,
    }
