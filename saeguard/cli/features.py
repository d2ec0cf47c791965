"""`saeguard features`: find the latents of a behaviour, and calibrate a feature set."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from saeguard.atomic_files import write_atomically
from saeguard.cli import fired
from saeguard.cli.files import mistakes_told

if TYPE_CHECKING:
    from collections.abc import Sequence

    from saeguard.features.corpus import Corpus
    from saeguard.features.search import Search
    from saeguard.features.types import Feature
    from saeguard.hf.model import LanguageModel

verb = typer.Typer(
    help="Find what detects a behaviour, and set thresholds for a wished false-positive rate.",
    no_args_is_help=True,
)

_ModelOption = Annotated[
    Path, typer.Option("--model", help="Folder of a Hugging Face model.", exists=True)
]
_SEED = typer.Option(help="Of resampling and controls; the same seed gives the same file.")

verb.command("fired")(fired.verb)


@verb.command()
def search(
    model: _ModelOption,
    sae: Annotated[Path, typer.Option(help="Folder of an SAE checkpoint.", exists=True)],
    data: Annotated[Path, typer.Option(help="Labelled JSON lines to choose on.", exists=True)],
    holdout: Annotated[
        Path,
        typer.Option(help="Labelled JSON lines of other templates, to measure on.", exists=True),
    ],
    behaviour: Annotated[str, typer.Option(help="Name of the behaviour, for the report.")],
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    kind: Annotated[str | None, typer.Option(help="Only positives of this kind.")] = None,
    benign: Annotated[
        Path | None,
        typer.Option(help="Ordinary JSON lines, as further negatives to choose on.", exists=True),
    ] = None,
    scope: Annotated[
        Literal["prompt", "output", "both"], typer.Option(help="Tokens that are read.")
    ] = "output",
    top: Annotated[int, typer.Option(help="Single latents to report.", min=1)] = 20,
    group_size: Annotated[int, typer.Option(help="Most latents in a group.", min=1)] = 8,
    seed: Annotated[int, _SEED] = 0,
) -> None:
    """Rank latents, a weighted group and a linear probe by how well they detect a behaviour.

    Everything is chosen on --data; AUROC and its interval are those on --holdout.
    """
    from saeguard.features.corpus import with_ordinary
    from saeguard.features.search import search as find
    from saeguard.hf.corpus import read_corpus
    from saeguard.sae import inspect

    with mistakes_told():
        info = inspect(sae)
        lm = _load_after(model, [data, holdout, *([] if benign is None else [benign])])

        def read(path: Path) -> Corpus:
            return read_corpus(lm, path, info.layer, lm.special_tokens).scoped(scope)

        split = read(data).of_kind(kind)
        if benign is not None:
            split = with_ordinary(split, read(benign))
        held = read(holdout).of_kind(kind)
        found = find(info, split, held, top=top, group_size=group_size, seed=seed)
        report = {
            "behaviour": behaviour,
            "kind": kind,
            "scope": scope,
            "seed": seed,
            "model": lm.name,
            "sae": {"sha256": info.sha256, "layer": info.layer},
            "texts": {"search": len(split), "holdout": len(held)},
            "findings": found.report(),
        }
        write_atomically(out, json.dumps(report, indent=2) + "\n")
    _print_table(found, f"{behaviour} {kind or ''}".strip())
    typer.echo(f"Written to {out}.")


@verb.command()
def calibrate(
    set_: Annotated[Path, typer.Option("--set", help="Feature-set file.", exists=True)],
    model: _ModelOption,
    benign: Annotated[
        Path, typer.Option(help="Ordinary JSON lines; they set the thresholds.", exists=True)
    ],
    check: Annotated[
        Path | None,
        typer.Option(help="Other ordinary lines, to measure the rate on.", exists=True),
    ] = None,
    labelled: Annotated[
        Path | None,
        typer.Option(
            help="Folder of BEHAVIOUR.search.jsonl and BEHAVIOUR.holdout.jsonl: sets the ranges "
            "and measures how much is caught.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    fpr: Annotated[float, typer.Option(help="Wished rate on ordinary texts.", min=0, max=1)] = 0.01,
    for_: Annotated[str, typer.Option("--for", help="Window, as in policies.")] = "1 of 1 tokens",
    topk: Annotated[
        Literal["exact", "approximate"] | None,
        typer.Option(
            help="Of an SAE whose latents fire by rank: rank them exactly, or by thresholds that "
            "are measured here. Default: as --set says.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write. Default: --set.")] = None,
) -> None:
    """Set each feature's range and threshold, and write the measured rates as its evidence."""
    from saeguard.features.calibrate import Texts
    from saeguard.features.calibrate import calibrate as set_thresholds
    from saeguard.features.fit_topk_thresholds import approximate
    from saeguard.features.load import load_feature_set, pin, save_feature_set
    from saeguard.hf.corpus import read_corpus
    from saeguard.hf.model import check_model
    from saeguard.policy.phrases import window

    with mistakes_told():
        features = load_feature_set(set_)
        try:
            span = window(for_)
        except ValueError as error:
            raise typer.BadParameter(f"found {for_!r}; {error}", param_hint="--for") from error
        if span.n is None:
            message = 'a window is calibrated: write it as "3 of 8 tokens"'
            raise typer.BadParameter(message, param_hint="--for")
        behaviours = dict.fromkeys(f.behaviour for f in features.features.values())
        pairs = {
            behaviour: (
                labelled / f"{behaviour}.search.jsonl",
                labelled / f"{behaviour}.holdout.jsonl",
            )
            for behaviour in behaviours
            if labelled is not None
        }
        given = [benign, *([] if check is None else [check])]
        lm = _load_after(model, [*given, *(path for pair in pairs.values() for path in pair)])
        check_model(lm, features)

        def read(path: Path) -> Corpus:
            return read_corpus(lm, path, features.sae.layer, features.exclude_tokens)

        ordinary, checked = read(benign), read(check) if check else None
        splits: dict[str, tuple[Corpus | None, Corpus | None]] = {}
        for behaviour in behaviours:
            splits[behaviour] = (None, None)
            if behaviour in pairs:
                found, held_out = pairs[behaviour]
                splits[behaviour] = read(found), read(held_out)
        ranks = replace(features.sae, approximation=None)
        stand_ins = None
        if topk == "approximate" or (topk is None and features.sae.approximation is not None):
            fit = [ordinary, *(split for split, _ in splits.values() if split is not None)]
            held = [held for _, held in splits.values() if held is not None]
            held += [] if checked is None else [checked]
            stand_ins = approximate(features, ranks.inspect(), fit, held)
        features = replace(features, sae=replace(pin(ranks), approximation=stand_ins))
        done: dict[str, Feature] = {}
        for name, feature in features.features.items():
            done[name] = set_thresholds(
                features,
                feature,
                Texts(ordinary, checked, *splits[feature.behaviour]),
                fpr=fpr,
                window=(span.k, span.n),
                decode=lm.tokenizer.decode,
            )
        target = out or set_
        save_feature_set(replace(features, features=done, status="calibrated"), target)
    for name, feature in done.items():
        measured = feature.evidence.get("fpr_holdout", feature.evidence["fpr_calibration"])
        low, high = measured["interval"]
        typer.echo(
            f"{name}: threshold {feature.threshold:g}, ordinary texts above it "
            f"{measured['rate']:.2%} ({low:.2%} to {high:.2%} of {measured['texts']})"
        )
    if stand_ins is not None:
        typer.echo(f"TopK latents are {stand_ins.told}.")
    typer.echo(f"Written to {target}.")


def _load_after(model: Path, texts: Sequence[Path]) -> LanguageModel:
    """Load a model once every text that it will read has been found to be one."""
    from saeguard.hf.corpus import read_outputs
    from saeguard.hf.model import load_model, load_tokenizer

    tokenizer = load_tokenizer(model)
    for path in texts:
        read_outputs(path, tokenizer)
    return load_model(model, tokenizer)


def _print_table(found: Search, title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("form", "made of", "AUROC search", "AUROC hold-out", "95 %", title=title)
    for finding in found.findings:
        low, high = finding.interval
        table.add_row(
            finding.form,
            finding.name,
            f"{finding.auroc_search:.3f}",
            f"{finding.auroc_holdout:.3f}",
            f"{low:.3f} to {high:.3f}",
        )
    Console().print(table)
