"""`saeguard features`: find latents that detect a behaviour, and calibrate feature sets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from saeguard.cli import (
    attribute,
    attribute_prompt,
    clamp_effect,
    coactivate,
    drift,
    fired,
    index,
    learn,
    neighbours,
    pin_features,
    search_features,
    steer,
)
from saeguard.cli.failures import Verbs
from saeguard.cli.features_report import print_norms, print_thresholds, print_unlabelled
from saeguard.cli.inputs import load_after
from saeguard.cli.options import (
    DeviceOption,
    DtypeOption,
    ModelOption,
    ModelOptions,
    existing_file,
    existing_folder,
)
from saeguard.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from saeguard.features.corpus import Corpus
    from saeguard.features.reading import Reading
    from saeguard.features.types import Feature, FeatureSet, SaeRef

verb = typer.Typer(
    cls=Verbs,
    help="Find latents that detect a behaviour, and set thresholds for a false-positive rate.",
    no_args_is_help=True,
)

verb.command("learn")(learn.verb)
verb.command("search")(search_features.verb)
verb.command("index")(index.verb)
verb.command("fired")(fired.verb)
verb.command("attribute")(attribute.verb)
verb.command("ablate")(attribute_prompt.ablate)
verb.command("steer")(steer.verb)
verb.command("neighbours")(neighbours.verb)
verb.command("coactivate")(coactivate.verb)
verb.command("clamp-effect")(clamp_effect.verb)
verb.command("pin")(pin_features.verb)
verb.command("drift")(drift.verb)


@verb.command()
def calibrate(
    set_: Annotated[Path, typer.Option("--set", help="Feature-set file.", callback=existing_file)],
    model: ModelOption,
    benign: Annotated[
        Path,
        typer.Option(
            help="Ordinary texts (JSON lines), which set the thresholds.", callback=existing_file
        ),
    ],
    check: Annotated[
        Path | None,
        typer.Option(
            help="Other ordinary texts (JSON lines), to measure the rate on.",
            callback=existing_file,
        ),
    ] = None,
    labelled: Annotated[
        Path | None,
        typer.Option(
            help="Folder of BEHAVIOUR.search.jsonl, which sets the ranges, and "
            "BEHAVIOUR.holdout.jsonl, on which the true-positive rate is measured.",
            callback=existing_folder,
        ),
    ] = None,
    fpr: Annotated[
        float, typer.Option(help="Share of ordinary texts that may match.", min=0, max=1)
    ] = 0.01,
    for_: Annotated[
        str | None,
        typer.Option(
            "--for",
            help="Window in tokens, as policies write it. Default: as the search chose it, or "
            "1 of 1 tokens.",
        ),
    ] = None,
    topk: Annotated[
        Literal["exact", "approximate"] | None,
        typer.Option(
            help="For a TopK SAE: rank its latents exactly, or use thresholds measured here in "
            "place of ranks. Default: as the feature set says.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Feature-set file to write. Default: --set.")
    ] = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
) -> None:
    """Set each feature's range and threshold, and write the measured rates into the feature set.

    The set may be new: ranges, thresholds and digests that it lacks are found here. A behaviour
    without labelled files keeps its range, and its true-positive rate is not measured.
    """
    from saeguard.features.calibrate import Texts
    from saeguard.features.calibrate import calibrate as set_thresholds
    from saeguard.features.corpus import norms_of
    from saeguard.features.load import load_feature_set, sae_of, save_feature_set
    from saeguard.features.massive import chosen_bounds
    from saeguard.features.model_identity import quantization_of, weights_sha256
    from saeguard.hf.corpus import read_corpus
    from saeguard.hf.model import check_model

    features = load_feature_set(set_, unfinished=True)
    if topk is not None:
        sae_of(features)
    reading = None if for_ is None else _reading(for_)
    behaviours = dict.fromkeys(f.behaviour for f in features.features.values())
    pairs = {} if labelled is None else _pairs(labelled, behaviours)
    given = [benign, *([] if check is None else [check])]
    read_first = [*given, *(path for pair in pairs.values() for path in pair)]
    lm = load_after(model, read_first, ModelOptions(dtype, device))
    check_model(lm, features)

    def read(path: Path) -> Corpus:
        return read_corpus(lm, path, features.layers, features.exclude_tokens)

    ordinary = read(benign)
    bounds, norms = norms_of(ordinary, chosen_bounds(features.max_norm, features.norms))
    ordinary = ordinary.without_massive(bounds)
    checked = read(check).without_massive(bounds) if check else None
    splits: dict[str, tuple[Corpus | None, Corpus | None]] = {}
    for behaviour in behaviours:
        splits[behaviour] = (None, None)
        if behaviour in pairs:
            found, held_out = pairs[behaviour]
            splits[behaviour] = (
                read(found).without_massive(bounds),
                read(held_out).without_massive(bounds),
            )
    if features.sae is not None:
        fit = [ordinary, *(split for split, _ in splits.values() if split is not None)]
        held = [held for _, held in splits.values() if held is not None]
        held += [] if checked is None else [checked]
        features = replace(features, sae=_pinned(features, topk, fit, held))
    done: dict[str, Feature] = {}
    for name, feature in features.features.items():
        done[name] = set_thresholds(
            features,
            feature,
            Texts(ordinary, checked, *splits[feature.behaviour]),
            fpr=fpr,
            reading=reading,
            decode=lm.tokenizer.decode,
        )
    target = out or set_
    measured = replace(
        features.model,
        sha256=weights_sha256(lm.path),
        dtype=dtype,
        quantization=quantization_of(lm.model.config),
        drift=(),  # of the thresholds before
    )
    features = replace(
        features,
        model=measured,
        features=done,
        status="calibrated",
        max_norm=bounds,
        norms=norms,
    )
    save_feature_set(features, target)
    print_unlabelled([n for n, f in done.items() if labelled and f.behaviour not in pairs])
    print_thresholds(done)
    if features.sae is not None and features.sae.approximation is not None:
        typer.echo(f"TopK latents are {features.sae.approximation.in_words}.")
    print_norms(bounds, norms)
    typer.echo(f"Wrote {target}.")


def _pairs(folder: Path, behaviours: Iterable[str]) -> dict[str, tuple[Path, Path]]:
    """Return the search and hold-out files of each behaviour that has one of them.

    Raises:
        InputError: the folder holds files of none.
    """
    named = {
        behaviour: (folder / f"{behaviour}.search.jsonl", folder / f"{behaviour}.holdout.jsonl")
        for behaviour in behaviours
    }
    there = {behaviour: pair for behaviour, pair in named.items() if any(p.exists() for p in pair)}
    if not there:
        wanted = " or ".join(pair[0].name for pair in named.values())
        raise InputError(f"--labelled: {folder} holds no {wanted}; name the files so")
    return there


def _reading(phrase: str) -> Reading:
    """Return the reading of a window in tokens, or of the last token."""
    from saeguard.features.reading import Reading
    from saeguard.policy.phrases import window

    try:
        span = window(phrase)
    except ValueError as error:
        raise InputError(f"--for: found {phrase!r}; {error}") from error
    if span.n is None:
        raise InputError(f'--for: found {phrase!r}; expected a window, such as "3 of 8 tokens"')
    return Reading(span.k, span.n, span.last)


def _pinned(
    features: FeatureSet, topk: str | None, fit: Sequence[Corpus], held: Sequence[Corpus]
) -> SaeRef:
    """Return a set's SAE with its digests, and with thresholds in place of ranks if asked for."""
    from saeguard.features.fit_topk_thresholds import approximate
    from saeguard.features.load import pin, sae_of

    sae = sae_of(features)
    ranks = replace(sae, approximation=None)
    stand_ins = None
    if topk == "approximate" or (topk is None and sae.approximation is not None):
        stand_ins = approximate(features, ranks.inspect(), fit, held)
    return replace(pin(ranks), approximation=stand_ins)
