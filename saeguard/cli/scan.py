"""`saeguard scan`: judge a file of texts with a Hugging Face model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saeguard.atomic_files import write_atomically
from saeguard.cli.files import mistakes_told

if TYPE_CHECKING:
    from saeguard.guard.verdict import Verdict


def verb(
    texts: Annotated[
        Path, typer.Argument(help="JSON lines: id, and text, or prompt with completion.")
    ],
    model: Annotated[Path, typer.Option(help="Folder of a Hugging Face model.", exists=True)],
    policies: Annotated[Path, typer.Option(help="Policy file or folder.", exists=True)],
    out: Annotated[Path, typer.Option(help="JSON lines to write, one per text and policy.")],
    feature_sets: Annotated[
        Path, typer.Option(help="Folder of feature sets.", exists=True, file_okay=False)
    ] = Path("feature_sets"),
) -> None:
    """Judge every text by every policy, as serving would, and write the verdicts.

    Exits with 0 whatever the verdicts are, 1 where a file is wrong, 2 where the command was.
    """
    from tqdm import tqdm

    from saeguard.features.load import load_feature_set
    from saeguard.guard.watchlist import build_watchlist
    from saeguard.hf.model import check_model, load_model, load_tokenizer
    from saeguard.hf.scan import scan
    from saeguard.hf.texts import TextError, read_texts
    from saeguard.policy.lint import leave_out_templates
    from saeguard.policy.load import load_policies

    with mistakes_told():
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
            raise TextError(f"{texts}: there is no text in it")
        lm = load_model(model, tokenizer)
        for features in sets.values():
            check_model(lm, features)
        judged = tqdm(scan(lm, watchlist, inputs), desc="scan", total=len(inputs), unit="text")
        verdicts: dict[int, Sequence[Verdict]] = dict(judged)
        lines = [
            json.dumps({"id": text.id} | record(verdict))
            for i, text in enumerate(inputs)
            for verdict in verdicts[i]
        ]
        write_atomically(out, "".join(f"{line}\n" for line in lines))
    matched = sum(any(v.outcome == "match" for v in found) for found in verdicts.values())
    typer.echo(f"{matched} of {len(inputs)} texts match a policy. Written to {out}.")


def record(verdict: Verdict) -> dict[str, Any]:
    """Return what one output line says of a verdict."""
    from saeguard.guard.verdict import THRESHOLD

    return {
        "policy": verdict.policy,
        "mode": verdict.mode,
        "verdict": verdict.outcome,
        "score": verdict.score,
        "threshold": THRESHOLD,
        "first_token": verdict.first_token,
        **({"approximate": True} if verdict.approximate else {}),
        "coverage": {
            "tokens": verdict.coverage.tokens,
            "evaluated": verdict.coverage.evaluated,
            "skipped": dict(verdict.coverage.skipped),
        },
    }
