"""`saeguard policy explain`: why a policy matched a request, or did not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saeguard.cli.feature_folder import FeatureSets, read_feature_sets
from saeguard.cli.inputs import (
    approximate_lines,
    approximations,
    judgeable,
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
from saeguard.errors import InputError

if TYPE_CHECKING:
    from saeguard.events.record_schema import Event
    from saeguard.features.edit_norm import Edit
    from saeguard.policy.types import Policy
    from saeguard.policy_tools.explanation import Explanation
    from saeguard.policy_tools.recording import Recording


def verb(
    policy: Annotated[
        Path, typer.Argument(help="Policy file, or a folder (choose one with --id).")
    ],
    source: Annotated[
        Path | None,
        typer.Argument(
            help="Event log or texts (.jsonl), or recording (.safetensors).",
            callback=existing_file,
        ),
    ] = None,
    request: Annotated[
        str | None,
        typer.Option(
            help="Id of the request, as the client got it or as the log has it; or of the text. "
            "Default: all."
        ),
    ] = None,
    id_: Annotated[
        str | None, typer.Option("--id", help="Id of the policy in a folder. Default: all.")
    ] = None,
    prompt: Annotated[str, typer.Option(help="Text in place of a file: the user's message.")] = "",
    completion: Annotated[str, typer.Option(help="Text in place of a file: the answer.")] = "",
    model: OptionalModel = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    feature_sets: FeatureSetsOption = FEATURE_SETS,
    as_json: Annotated[bool, typer.Option("--json", help="Print records for programs.")] = False,
) -> None:
    """Explain a verdict: which selections held at which tokens, and what the policy did.

    An event log holds each feature's highest share only; a recording, or texts with --model, show
    every token. Exit codes: 0 whatever the verdict, 2 a file or the command is wrong, 3 something
    is missing.
    """
    if source is not None and (prompt or completion):
        raise InputError(f"give either {source} or --prompt and --completion, not both")
    known = read_all([policy])
    policies = [p for p in known if id_ in (None, p.id)]
    if not policies:
        ids = ", ".join(sorted({p.id for p in known}))
        raise InputError(f"{policy}: there is no policy with the id {id_}; there are: {ids}")
    if source is not None and source.suffix == ".jsonl" and model is None:
        found = list(of_log(source, policies, request))
    else:
        sets = read_feature_sets(feature_sets)
        ready, notes = judgeable(policies, sets)
        if not ready:
            raise InputError("\n".join(note.render() for note in notes))
        options = ModelOptions(dtype, device)
        if source is not None:
            recording = open_corpus(source, ready, model, feature_sets, options)
        else:
            recording = of_text(prompt, completion, ready, model, feature_sets, options)
        found = list(of_recording(recording, ready, sets, request))
    if as_json:
        typer.echo(json.dumps([record for record, _ in found], indent=2))
    else:
        typer.echo("\n\n".join("\n".join(lines) for _, lines in found))


def of_text(
    prompt: str,
    completion: str,
    policies: Sequence[Policy],
    model: Path | None,
    feature_sets: Path,
    options: ModelOptions,
) -> Recording:
    """Record the text that the command line gives."""
    if model is None or not (prompt or completion):
        raise InputError(
            "give a recording, an event log, or --model with --prompt and --completion"
        )
    from saeguard.hf.model import load_model
    from saeguard.hf.texts import make_turn
    from saeguard.policy_tools.record_features import record_features

    lm = load_model(model, **options._asdict())
    text = make_turn("text", lm.tokenizer, prompt, completion)
    names = sorted({policy.feature_set for policy in policies})
    files = [feature_sets / f"{name}.yaml" for name in names]
    return record_features(lm, files, [text], path=model, with_text=True)


def of_recording(
    recording: Recording, policies: Sequence[Policy], sets: FeatureSets, request: str | None
) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Yield the record of each policy and text, with its lines for a terminal."""
    from saeguard.policy.weak import clamp_edit
    from saeguard.policy_tools.explain_text import in_words
    from saeguard.policy_tools.explanation import explain

    texts = range(len(recording.ids)) if request is None else [recording.text(request)]
    for text in texts:
        here = recording.span(text)
        pieces = None if recording.pieces is None else recording.pieces[here]
        for policy in policies:
            found = explain(policy, sets.known, recording, text)
            lines = [f"Text {recording.ids[text]}", "", *in_words(found, pieces, written(policy))]
            edit = None
            if policy.clamp is not None:
                edit = clamp_edit(policy, sets.known[policy.feature_set])
                lines += ["", _clamp_line(edit)]
            approximate = approximations([policy], sets)
            if approximate:
                lines += ["", *approximate_lines(approximate)]
            record = _record(recording.ids[text], found, bool(approximate))
            yield record | ({} if edit is None else {"edit": edit._asdict()}), lines


def _clamp_line(edit: Edit | None) -> str:
    if edit is None:
        return "The clamp's size was not measured; `saeguard features calibrate` measures it."
    return f"If it clamps, {edit.in_words}."


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


def _record(id_: str, found: Explanation, approximate: bool) -> dict[str, Any]:
    import numpy as np

    from saeguard.events.records import verdict_record

    v = found.verdict

    def at(mask: np.ndarray) -> list[int]:
        return [int(i) for i in np.flatnonzero(mask)]

    return {
        "text": id_,
        **verdict_record(v),
        "approximate": approximate,
        "on": at(found.on),
        "condition_holds": at(found.evidence > 1),
        "selections": {
            name: {
                "feature": selection.feature,
                "above": selection.above,
                "values": [round(float(x), 6) for x in found.values[name]],
                "holds": at(found.looked & (found.values[name] > selection.above)),
            }
            for name, selection in found.policy.detect.items()
        },
        "looked": at(found.looked),
        "prompt_tokens": found.prompt_tokens,
    }
