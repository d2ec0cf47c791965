"""What `saeguard policy explain` says of the events of a log."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from saeguard.cli.report import columns, count
from saeguard.errors import InputError

if TYPE_CHECKING:
    from saeguard.events.record_schema import Event
    from saeguard.policy.types import Policy


def of_log(
    path: Path, policies: Sequence[Policy], request: str | None
) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Yield each event of the policies, with its lines for a terminal."""
    from saeguard.events.reader import is_of_request, read_log, torn_lines
    from saeguard.events.record_schema import Request

    ids = list(dict.fromkeys(policy.id for policy in policies))
    by_digest = {policy.digest: policy for policy in policies}
    seen, judged, torn = False, 0, list[int]()
    for event in read_log(path, torn):
        mine = request is None or is_of_request(event.request_id, request)
        if isinstance(event, Request):
            judged += mine
            continue
        if event.policy not in ids or not mine:
            continue
        seen = True
        lines = list(_event(event, by_digest.get(event.policy_digest)))
        yield event.model_dump(mode="json", by_alias=True), lines
    if torn:
        typer.echo(f"{path}: {torn_lines(torn)}", err=True)
    if not seen:
        raise InputError(_no_event(path, ids, request, judged))


def _no_event(path: Path, policies: Sequence[str], request: str | None, judged: int) -> str:
    """Return why a log has no event of the policies, of `judged` requests that it has lines of."""
    found = f"{path}: there is no event of {', '.join(policies)}"
    found += f" for the request {request}" if request else ""
    if not judged:
        return found
    return (
        f"{found}. The log has the line of {count(judged, 'request')}, and lines of verdicts that "
        "match or are errors, so these policies did neither, or did not apply. To have a line for "
        "every verdict, serve with --event-lines all"
    )


def written(policy: Policy) -> dict[str, str]:
    """Return the condition and the window as the policy's file spells them."""
    from saeguard.policy.load import locate

    data = locate(policy).data or {}
    return {
        "condition": str(data.get("condition", "(the file has changed)")),
        "for": str(data.get("for", "1 of 1 tokens")),
    }


def _event(event: Event, policy: Policy | None) -> Iterator[str]:
    """Yield the lines of one event.

    Args:
        event: from the log.
        policy: that wrote it; None if the files hold another one by now.
    """
    score = "" if event.score is None else f" The score is {event.score:.2f}; it matches above 1."
    verdict = event.verdict.replace("_", " ").upper()
    where = ""
    if event.verdict == "match":
        on = count(event.matched_tokens, "token")
        where = f", first at token {event.first_token}. It was on at {on}"
    done: str = event.acted or "nothing"
    if event.exception:
        done = f"nothing, by the exception {event.exception}"
    c = event.coverage
    skipped = {k: v for k, v in c.skipped.model_dump().items() if v}
    left = ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in skipped.items())
    yield f"Request {event.request_id}"
    yield ""
    yield event.policy if policy is None else f"{event.policy}: {policy.title}"
    yield f"  {event.severity} severity, {event.mode}, action {event.action}; done: {done}"
    yield ""
    yield f"{verdict}{where}.{score}"
    yield ""
    looked = f"It looked at {c.evaluated} of {count(c.tokens, 'token')}"
    yield f"{looked} (not: {left})." if left else f"{looked}."
    if event.error:
        yield f"Error: {event.error}."
    if event.approximate:
        yield "Its TopK latents were approximate: measured thresholds stood for ranks."
    yield ""
    yield from _fired(event) if policy is None else _selections(event, policy)
    yield ""
    yield (
        "An event holds each feature's highest share, not every token's. To see every token, "
        "judge the text again: saeguard policy explain with --model, or with a recording."
    )


def _selections(event: Event, policy: Policy) -> Iterator[str]:
    """Yield the lines of the selections of the policy that wrote an event."""
    rows = [("selection", "feature", "holds above", "highest", "at token", "tokens above")]
    for name, selection in policy.detect.items():
        fired = event.features.get(selection.feature)
        row = ("-", "-", "-") if fired is None else (f"{fired.max:.3g}", f"{fired.at}",
                                                     f"{fired.count}")  # fmt: skip
        rows.append((name, selection.feature, f"{selection.above:g}", *row))
    yield from columns(rows)
    as_written = written(policy)
    yield f"Condition: {' '.join(as_written['condition'].split())}, at {as_written['for']}."


def _fired(event: Event) -> Iterator[str]:
    """Yield the lines of an event whose policy has changed: nothing of the policy of today."""
    rows = [("feature", "highest", "at token", "tokens above")]
    for name, fired in event.features.items():
        rows.append((name, f"{fired.max:.3g}", f"{fired.at}", f"{fired.count}"))
    yield from columns(rows)
    yield (
        "The policy file has changed since: the event is of digest "
        f"{event.policy_digest[:12]}, which no file has now, so thresholds and condition are not "
        "shown. Name the policies of then, such as a checkout of an earlier commit, to see them."
    )
