"""`saeguard scan`: judge a file of texts with a Hugging Face model, without vLLM."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saeguard.atomic_files import write_atomically
from saeguard.cli.options import (
    FEATURE_SETS,
    FeatureSetsOption,
    ModelOption,
    check_feature_sets,
    existing_file,
)
from saeguard.errors import InputError

if TYPE_CHECKING:
    from saeguard.guard.verdict import Verdict


def verb(
    texts: Annotated[
        Path,
        typer.Argument(
            help="JSON lines with an id, and a text or a prompt and completion.",
            callback=existing_file,
        ),
    ],
    model: ModelOption,
    policies: Annotated[Path, typer.Option(help="Policy file or folder.")],
    out: Annotated[Path, typer.Option(help="JSON lines to write, one per text and policy.")],
    feature_sets: FeatureSetsOption = FEATURE_SETS,
) -> None:
    """Judge every text by every policy, by the rules that serve, and write the verdicts.

    Exit codes: 0 whatever the verdicts, 2 a file, the model or the command is wrong, 3 a package is
    missing.
    """
    from tqdm import tqdm

    from saeguard.events.records import verdict_record
    from saeguard.features.load import load_feature_set
    from saeguard.guard.build_watchlist import build_watchlist
    from saeguard.hf.model import check_model, load_model, load_tokenizer
    from saeguard.hf.scan import scan
    from saeguard.hf.texts import read_texts
    from saeguard.policy.lint import leave_out_templates
    from saeguard.policy.load import load_policies

    check_feature_sets(feature_sets)
    loaded, notes = leave_out_templates(load_policies(policies), feature_sets)
    for note in notes:
        typer.echo(note.render(), err=True)
    wanted = {policy.feature_set for policy in loaded}
    sets = {
        features.id: features
        for features in (
            load_feature_set(path)
            for path in sorted(feature_sets.rglob("*.yaml"))
            if path.relative_to(feature_sets).with_suffix("").as_posix() in wanted
        )
    }
    watchlist = build_watchlist(loaded, sets)
    tokenizer = load_tokenizer(model)
    inputs = read_texts(texts, tokenizer)
    if not inputs:
        raise InputError(f"{texts}: the file holds no text")
    lm = load_model(model, tokenizer)
    for features in sets.values():
        check_model(lm, features)
    judged = tqdm(scan(lm, watchlist, inputs), desc="scan", total=len(inputs), unit="text")
    verdicts: dict[int, Sequence[Verdict]] = dict(judged)
    lines = [
        json.dumps({"id": text.id} | verdict_record(verdict))
        for i, text in enumerate(inputs)
        for verdict in verdicts[i]
    ]
    write_atomically(out, "".join(f"{line}\n" for line in lines))
    matched = sum(any(v.outcome == "match" for v in found) for found in verdicts.values())
    typer.echo(f"{matched} of {len(inputs)} texts match a policy. Wrote {out}.")
