"""`saeguard policy replay`: what other policies would have concluded on recorded requests."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from saeguard.cli.feature_folder import read_feature_sets
from saeguard.cli.inputs import (
    approximate_lines,
    approximations,
    judge_corpus,
    judgeable,
    not_judged,
    read_all,
)
from saeguard.cli.options import FEATURE_SETS, FeatureSetsOption, existing_file
from saeguard.cli.report import columns, count
from saeguard.errors import InputError

if TYPE_CHECKING:
    from saeguard.events.record_schema import Event
    from saeguard.policy.types import Policy
    from saeguard.policy_tools.policy_diff import Pair
    from saeguard.policy_tools.verdict_diff import Shift

V2 = "saeguard.event/v2"
"""Schema of logs with a line for each verdict, and none for a request as a whole."""
SHOWN = 20
"""The text output names at most so many requests; JSON names all."""
NO_VERDICT = (
    "the file holds no verdict, so there is nothing to replay. Either this is not the file that "
    "the server's `events` (--events of `saeguard serve`) names, or no request has ended under the "
    "guard yet: send one, and look for `saeguard ready` in the server's log"
)


def verb(
    log: Annotated[
        Path,
        typer.Argument(
            help="Event log (JSON lines), or recording (.safetensors).", callback=existing_file
        ),
    ],
    policies: Annotated[Path, typer.Option(help="Policy file or folder to try out.")],
    was: Annotated[
        Path | None,
        typer.Option(help="Policy file or folder that wrote the log. Optional for a recording."),
    ] = None,
    feature_sets: FeatureSetsOption = FEATURE_SETS,
    format_: Annotated[
        Literal["text", "json"], typer.Option("--format", help="text, or json for programs.")
    ] = "text",
) -> None:
    """Judge recorded requests by other policies, and list the verdicts that would change.

    A recording holds every token's features, so every verdict is known. An event holds a score and
    each feature's highest share; if they do not decide, the verdict is "unknown". Exit codes: 0
    whatever changes, 2 a file or the command is wrong, 3 something is missing.
    """
    new = read_all([policies])
    old = read_all([was]) if was is not None else None
    if log.suffix == ".safetensors":
        report = of_recording(log, old, new, feature_sets)
    elif old is None:
        raise InputError("an event log needs --was: the policies that wrote it")
    else:
        report = of_events(log, old, new)
    typer.echo(json.dumps(report, indent=2) if format_ == "json" else "\n".join(_lines(report)))


def of_recording(
    path: Path, old: Sequence[Policy] | None, new: Sequence[Policy], feature_sets: Path
) -> dict[str, Any]:
    """Judge a recording by the new policies, and by the old ones if they are given."""
    from saeguard.policy_tools.policy_diff import pairs
    from saeguard.policy_tools.recording import read_recording
    from saeguard.policy_tools.verdict_diff import shifts

    sets = read_feature_sets(feature_sets)
    recording = read_recording(path)
    ready, _ = judgeable(new, sets)
    before, _ = judgeable(old if old is not None else new, sets)
    new_verdicts = judge_corpus(ready, sets, recording)
    old_verdicts = judge_corpus(before, sets, recording) if old is not None else new_verdicts
    both = pairs(before, ready)
    tally: dict[str, Counter[str]] = {pair.name: Counter() for pair in both}
    changed: list[Shift] = []
    for i, id_ in enumerate(recording.ids):
        was = {p.path: v for p, v in zip(before, old_verdicts[i], strict=True)}
        now = {p.path: v for p, v in zip(ready, new_verdicts[i], strict=True)}
        beside = [
            (pair, was[pair.old.path] if pair.old else None,
             now[pair.new.path] if pair.new else None)
            for pair in both
        ]  # fmt: skip
        for pair, v_old, v_new in beside:
            before_, after = (v.outcome if v else "absent" for v in (v_old, v_new))
            tally[pair.name][f"{before_} -> {after}"] += 1
        changed += shifts(id_, beside)
    left_out = {policy.id for policy in new} - {policy.id for policy in ready}
    read = approximations([*before, *ready], sets)
    return _report(tally, changed, sorted(left_out)) | {"approximate": read}


def of_events(path: Path, old: Sequence[Policy], new: Sequence[Policy]) -> dict[str, Any]:
    """Judge events by the new policies, as far as their scores and shares decide."""
    from saeguard.events.reader import read_log, torn_lines
    from saeguard.events.record_schema import Request
    from saeguard.policy_tools.policy_diff import pairs
    from saeguard.policy_tools.verdict_diff import Shift

    both = {pair.old.digest: pair for pair in pairs(old, new) if pair.old is not None}
    tally: dict[str, Counter[str]] = {pair.name: Counter() for pair in both.values()}
    changed: list[Shift] = []
    unread: Counter[str] = Counter()
    approximate: Counter[str] = Counter()
    torn: list[int] = []
    quiet = listed = 0
    for event in read_log(path, torn):
        if isinstance(event, Request):
            quiet += event.verdicts.no_match + event.verdicts.not_evaluated
            continue
        listed += event.schema_ != V2 and event.verdict in {"no_match", "not_evaluated"}
        pair = both.get(event.policy_digest)
        if pair is None:
            unread[f"{event.policy} {event.policy_digest[:12]}"] += 1
            continue
        approximate[pair.name] += event.approximate
        after, score = answer(event, pair)
        tally[pair.name][f"{event.verdict} -> {after}"] += 1
        if after not in {event.verdict, "unknown"}:
            changed.append(
                Shift(event.request_id, pair.name, event.verdict, after, event.score, score,
                      event.first_token)
            )  # fmt: skip
    if not quiet and not unread and not any(tally.values()):
        raise InputError(f"{path}: {NO_VERDICT}")
    if unread and not any(tally.values()):
        raise InputError(
            f"{path}: none of its verdicts is of a policy in --was; name the policies that wrote "
            f"the log. It has: {', '.join(sorted(unread))}"
        )
    if torn:
        typer.echo(f"{path}: {torn_lines(torn)}", err=True)
    unasked = [pair.name for pair in pairs(old, new) if pair.old is None]
    return _report(tally, changed, []) | {
        "unread": dict(unread),
        "without_line": max(0, quiet - listed),
        "not_in_log": unasked,
        "approximate_events": dict(+approximate),
        "torn_lines": len(torn),
    }


def answer(event: Event, pair: Pair) -> tuple[str, float | None]:
    """Return the new policy's verdict on the event's request, and its score; None if unknown."""
    from saeguard.policy_tools.score_bounds import Recorded, foretell, same_verdict, verdict_of

    if pair.new is None:
        return "absent", None
    assert pair.old is not None
    if same_verdict(pair.old, pair.new):
        return event.verdict, event.score
    if event.verdict not in {"match", "no_match"}:
        return "unknown", None
    low, high = foretell(Recorded(event.score, event.features), pair.old, pair.new)
    return verdict_of((low, high)), low if low == high else None


def _report(
    tally: dict[str, Counter[str]], changed: Sequence[Shift], left_out: Sequence[str]
) -> dict[str, Any]:
    return {
        "policies": [{"policy": name, "verdicts": dict(n)} for name, n in sorted(tally.items())],
        "changed": [asdict(shift) for shift in changed],
        "not_calibrated": list(left_out),
    }


def _lines(report: dict[str, Any]) -> Iterator[str]:
    """Yield the report as lines for a terminal."""
    rows = [
        (record["policy"], f"{n}", verdicts)
        for record in report["policies"]
        for verdicts, n in sorted(record["verdicts"].items())
    ]
    yield from columns([("policy", "requests", "verdict -> would be"), *rows])
    unknown = sum(
        n
        for record in report["policies"]
        for verdicts, n in record["verdicts"].items()
        if verdicts.endswith("unknown")
    )
    if unknown:
        yield ""
        yield (
            f"{count(unknown, 'verdict')} unknown: an event holds a score and each feature's "
            "highest share, not every token. Record the texts with `saeguard policy record` to "
            "know."
        )
    yield from approximate_lines(report.get("approximate", {}))
    for policy, n in report.get("approximate_events", {}).items():
        yield (
            f"{count(n, 'event')} of {policy}: TopK latents were approximate: measured thresholds "
            "stood for ranks"
        )
    if n := report.get("without_line"):
        yield (
            f"{count(n, 'verdict')} without a match, of any policy, with no line of their own: the "
            "log has lines of matches and errors only, so what another policy would find there is "
            "unknown. `saeguard serve --event-lines all` writes a line for each"
        )
    for policy, n in report.get("unread", {}).items():
        yield f"{count(n, 'event')} of {policy} skipped: no policy under --was has this digest"
    for name in report.get("not_in_log", ()):
        yield f"{name} is new: the log holds no event of it"
    yield from not_judged(report["not_calibrated"])
    yield ""
    yield f"{count(len(report['changed']), 'verdict')} would change"
    for shift in report["changed"][:SHOWN]:
        yield f"  {shift['request']}: {shift['policy']}: {shift['old']} -> {shift['new']}"
    if len(report["changed"]) > SHOWN:
        yield f"  and {len(report['changed']) - SHOWN} more; --format json names all"
