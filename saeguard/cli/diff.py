"""`saeguard policy diff`: what changed between two folders of policies, and its effect."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from saeguard.cli.feature_folder import read_feature_sets
from saeguard.cli.inputs import (
    judge_corpus,
    judgeable,
    not_judged,
    open_corpus,
    read_all,
)
from saeguard.cli.options import (
    FEATURE_SETS,
    DeviceOption,
    DtypeOption,
    FeatureSetsOption,
    ModelOptions,
    OptionalModel,
    existing_file,
)
from saeguard.cli.report import columns, count
from saeguard.errors import FINDINGS, InputError

if TYPE_CHECKING:
    from saeguard.guard.verdict import Verdict
    from saeguard.policy.types import Policy
    from saeguard.policy_tools.policy_diff import Pair
    from saeguard.policy_tools.recording import Recording
    from saeguard.policy_tools.verdict_diff import Done, Shift

SHOWN = 4
"""A line names at most so many texts; JSON names all, with scores and tokens."""


def verb(
    old: Annotated[Path, typer.Argument(help="Policy file or folder before the change.")],
    new: Annotated[Path, typer.Argument(help="Policy file or folder after the change.")],
    corpus: Annotated[
        Path | None,
        typer.Option(
            help="Texts to judge by both: JSON lines (with --model), or a recording.",
            callback=existing_file,
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Exit with 1 if more than this share of the texts would change.", min=0, max=1
        ),
    ] = None,
    model: OptionalModel = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    feature_sets: FeatureSetsOption = FEATURE_SETS,
    format_: Annotated[
        Literal["text", "json"], typer.Option("--format", help="text, or json for programs.")
    ] = "text",
) -> None:
    """Compare two folders of policies key by key, and verdict by verdict on a corpus.

    A text counts as changed if a verdict on it changes, or the action. Exit codes: 0, 1 more than
    --budget change, 2 a file or the command is wrong, 3 something is missing.
    """
    from saeguard.policy_tools.policy_diff import pairs

    if budget is not None and corpus is None:
        raise InputError("--budget: needs a --corpus to measure the share on")
    before, after = read_all([old]), read_all([new])
    sets = read_feature_sets(feature_sets) if corpus is not None else None
    both = pairs(before, after)
    records = [_changed(pair) for pair in both]
    report: dict[str, Any] = {"policies": [record for record in records if record]}
    if sets is not None and corpus is not None:
        ready_old, _ = judgeable(before, sets)
        ready_new, _ = judgeable(after, sets)
        recording = open_corpus(
            corpus, (*ready_old, *ready_new), model, feature_sets, ModelOptions(dtype, device)
        )
        judged_old = judge_corpus(ready_old, sets, recording)
        judged_new = judge_corpus(ready_new, sets, recording)
        found = _found(
            pairs(ready_old, ready_new), recording,
            (ready_old, judged_old), (ready_new, judged_new),
        )  # fmt: skip
        report["corpus"] = _measured(found, recording, budget)
        left_out = {p.id for p in (*before, *after)} - {p.id for p in (*ready_old, *ready_new)}
        report["not_calibrated"] = sorted(left_out)
    typer.echo(json.dumps(report, indent=2) if format_ == "json" else "\n".join(_lines(report)))
    if report.get("corpus", {}).get("over_budget"):
        raise typer.Exit(FINDINGS)


def _changed(pair: Pair) -> dict[str, Any] | None:
    from saeguard.policy_tools.policy_diff import changes

    differing = changes(pair)
    what = "added" if pair.old is None else "removed" if pair.new is None else "changed"
    if what == "changed" and not differing:
        return None
    return {"policy": pair.name, "what": what, "changes": [asdict(c) for c in differing]}


def _found(
    both: Sequence[Pair],
    recording: Recording,
    old: tuple[Sequence[Policy], Sequence[Sequence[Verdict]]],
    new: tuple[Sequence[Policy], Sequence[Sequence[Verdict]]],
) -> list[tuple[str, list[Shift], Done | None]]:
    """Return each text that changes, with the verdicts and the action that change."""
    from saeguard.policy_tools.verdict_diff import done, shifts

    found = []
    for i, id_ in enumerate(recording.ids):
        before = {p.path: v for p, v in zip(old[0], old[1][i], strict=True)}
        after = {p.path: v for p, v in zip(new[0], new[1][i], strict=True)}
        beside = [
            (pair, before[pair.old.path] if pair.old else None,
             after[pair.new.path] if pair.new else None)
            for pair in both
        ]  # fmt: skip
        moved = shifts(id_, beside)
        otherwise = done(id_, old[1][i], new[1][i])
        if moved or otherwise:
            found.append((id_, moved, otherwise))
    return found


def _measured(
    found: Sequence[tuple[str, list[Shift], Done | None]],
    recording: Recording,
    budget: float | None,
) -> dict[str, Any]:
    from saeguard.cli.false_alarms import rate

    share, interval = rate(len(found), len(recording.ids))
    return {
        "texts": len(recording.ids),
        "changed": len(found),
        "rate": share,
        "interval": list(interval),
        "budget": budget,
        "over_budget": budget is not None and share > budget,
        "requests": [
            {
                "request": id_,
                "verdicts": [asdict(shift) for shift in moved],
                "done": asdict(otherwise) if otherwise else None,
            }
            for id_, moved, otherwise in found
        ],
    }


def _lines(report: dict[str, Any]) -> list[str]:
    """Return the report as lines for a terminal."""
    lines = []
    for record in report["policies"]:
        lines.append(f"{record['what']:8} {record['policy']}")
        rows = [
            (f"    {c['key']}", f"{_short(c['old'])} -> {_short(c['new'])}", f"({c['weight']})")
            for c in record["changes"]
        ]
        lines += columns(rows)
    if not report["policies"]:
        lines.append("no policy has changed")
    lines += not_judged(report.get("not_calibrated", ()))
    measured = report.get("corpus")
    if measured is None:
        return lines
    low, high = measured["interval"]
    share = f"{measured['rate']:.2%} (95 %: {low:.2%} to {high:.2%})"
    texts = count(measured["texts"], "text")
    lines += ["", f"{measured['changed']} of {texts} would change: {share}"]
    for what, ids in _kinds(measured):
        lines.append(f"  {what}: {count(len(ids), 'text')}: {_named(ids)}")
    if measured["budget"] is not None:
        verdict = "above" if measured["over_budget"] else "within"
        lines.append(f"{verdict} the budget of {measured['budget']:.2%}")
    return lines


def _kinds(measured: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Return each kind of change with the texts it happens to, changes of verdict first."""
    verdicts: dict[str, list[str]] = {}
    actions: dict[str, list[str]] = {}
    for request in measured["requests"]:
        for v in request["verdicts"]:
            kind = f"{v['policy']}: {v['old']} -> {v['new']}"
            verdicts.setdefault(kind, []).append(request["request"])
        if request["done"]:
            kind = f"done: {request['done']['old']} -> {request['done']['new']}"
            actions.setdefault(kind, []).append(request["request"])
    return [*sorted(verdicts.items()), *sorted(actions.items())]


def _named(ids: Sequence[str]) -> str:
    return ", ".join(ids[:SHOWN]) + (", ..." if len(ids) > SHOWN else "")


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."  # noqa: PLR2004
