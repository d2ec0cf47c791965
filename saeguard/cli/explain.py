"""`saeguard policy explain`: why a policy matched a request, or did not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saeguard.cli.explain_log import of_log, written
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
from saeguard.errors import InputError

if TYPE_CHECKING:
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
