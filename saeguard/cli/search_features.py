"""`saeguard features search`: latents, groups and probes that detect a behaviour."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from saeguard.atomic_files import write_atomically
from saeguard.cli import search_prompt
from saeguard.cli.features_report import print_findings, print_norms
from saeguard.cli.inputs import load_after
from saeguard.cli.on_prompt import CompletionOption, IndexOption
from saeguard.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    ModelOptions,
    SetOption,
    existing_file,
    existing_folder,
)
from saeguard.errors import FINDINGS, InputError

if TYPE_CHECKING:
    from saeguard.features.corpus import Corpus
    from saeguard.sae import SaeInfo


def verb(
    model: ModelOption,
    data: Annotated[
        Path | None,
        typer.Option(help="Labelled texts (JSON lines) to choose on.", callback=existing_file),
    ] = None,
    holdout: Annotated[
        Path | None,
        typer.Option(
            help="Labelled texts (JSON lines) of other templates, to measure on.",
            callback=existing_file,
        ),
    ] = None,
    behaviour: Annotated[
        str | None, typer.Option(help="Name of the behaviour, for the report.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="For --data: report to write, JSON.")] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="Prompt in place of --data: latents that fire on it. Repeatable: on all of them."
        ),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(help="With --prompt: prompt on which they must not fire. Repeatable."),
    ] = None,
    completion: CompletionOption = "",
    by: Annotated[
        Literal["strength", "specific", "position"],
        typer.Option(
            help="With --prompt: strongest first; those first that are so strong on the fewest "
            "tokens of --index or --benign; or token by token."
        ),
    ] = "strength",
    index: IndexOption = None,
    set_: SetOption = None,
    sae: Annotated[
        Path | None,
        typer.Option(
            help="Folder of an SAE checkpoint. Without one, only probes are searched.",
            callback=existing_folder,
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Layers for probes, such as 14,18,22: each alone and all together. "
            "Default: the SAE's."
        ),
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="Use positives of this kind only. Default: all kinds.")
    ] = None,
    benign: Annotated[
        Path | None,
        typer.Option(
            help="Ordinary texts (JSON lines), as further negatives to choose on, or as the "
            "background of --prompt.",
            callback=existing_file,
        ),
    ] = None,
    scope: Annotated[
        Literal["prompt", "output", "both"], typer.Option(help="Tokens to look at.")
    ] = "output",
    top: Annotated[int, typer.Option(help="Number of single latents to show.", min=1)] = 20,
    group_size: Annotated[
        int, typer.Option(help="Highest number of latents in a group.", min=1)
    ] = 8,
    seed: Annotated[int, typer.Option(help="Random seed of resampling and controls.")] = 0,
    write_set: Annotated[
        Path | None,
        typer.Option(
            help="Feature set to write the detector into, for `features calibrate`. A set that is "
            "there gets one more feature."
        ),
    ] = None,
    form: Annotated[
        Literal["best", "probe", "group", "latent"],
        typer.Option(
            help="Detector to write. best: the group, unless the probe is clearly better."
        ),
    ] = "best",
    feature: Annotated[
        str | None, typer.Option(help="Name of the feature. Default: behaviour and kind.")
    ] = None,
    title: Annotated[
        str | None, typer.Option(help="Title of the feature. Default: behaviour and kind.")
    ] = None,
    accept_weak: Annotated[
        bool,
        typer.Option(
            "--accept-weak", help="Write the detector even if it is no better than chance."
        ),
    ] = False,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Rank latents on prompts, or latents, groups and probes as detectors of a behaviour.

    With --prompt, what fires on it, or on all of several and on none of --without. With --data,
    everything is chosen on it; AUROC and its 95 % interval are measured on --holdout. Exit code 1:
    --write-set was given, and nothing was found.
    """
    if prompt:
        if data is not None or holdout is not None or write_set is not None:
            raise InputError("--prompt: expected no --data, --holdout or --write-set beside it")
        search_prompt.search(
            model, sae, set_, index, benign,
            search_prompt.Wanted(prompt, without or [], completion, by, top),
            ModelOptions(dtype, device), as_json=as_json,
        )  # fmt: skip
        return
    if data is None or holdout is None or behaviour is None or out is None:
        raise InputError(
            "there is nothing to search; give --prompt, or --data, --holdout, --behaviour and --out"
        )
    from saeguard.features.corpus import norms_of, with_ordinary
    from saeguard.features.found import (
        choose,
        evidence_of,
        feature_name,
        new_set,
        set_at,
        useless,
        with_found,
    )
    from saeguard.features.load import save_feature_set
    from saeguard.features.massive import chosen_bounds, norms_as_plain
    from saeguard.features.reading import READINGS
    from saeguard.features.search import search as find
    from saeguard.hf.corpus import read_corpus
    from saeguard.sae import inspect

    info = None if sae is None else inspect(sae)
    probed, read_layers = layers_to_read(layers, info)
    read_first = [data, holdout, *([] if benign is None else [benign])]
    lm = load_after(model, read_first, ModelOptions(dtype, device))
    features = None
    if write_set is not None:
        features = set_at(
            new_set(write_set, lm.shape, lm.path, info, lm.special_tokens, dtype=dtype)
        )

    def read(path: Path) -> Corpus:
        return read_corpus(lm, path, read_layers, lm.special_tokens)

    searched = read(data)
    chosen_by_hand = {} if features is None else chosen_bounds(features.max_norm, features.norms)
    bounds, norms = norms_of(searched, chosen_by_hand)
    split = searched.without_massive(bounds).scoped(scope).of_kind(kind)
    if benign is not None:
        split = with_ordinary(split, read(benign).without_massive(bounds).scoped(scope))
    held = read(holdout).without_massive(bounds).scoped(scope).of_kind(kind)
    found = find(
        info,
        split,
        held,
        layers=probed or None,
        top=top,
        group_size=group_size,
        seed=seed,
        readings=READINGS,
    )
    report = {
        "behaviour": behaviour,
        "kind": kind,
        "scope": scope,
        "seed": seed,
        "model": lm.name,
        "sae": None if info is None else {"sha256": info.sha256, "layer": info.layer},
        "texts": {"search": len(split), "holdout": len(held)},
        "max_norm": bounds,
        "norms_measured": norms_as_plain(norms),
        "findings": found.report(),
    }
    chosen = choose(found, form)
    evidence = evidence_of(found, chosen, scope, kind)
    report["nothing_found"] = useless(evidence)
    write_atomically(out, json.dumps(report) + "\n")
    print_findings(found, f"{behaviour} {kind or ''}".strip())
    print_norms(bounds, norms)
    typer.echo(f"Wrote {out}.")
    if useless(evidence):
        typer.echo(f"Nothing was found: the {chosen.form} is {useless(evidence)}.", err=True)
    if features is None:
        return
    if useless(evidence) and not accept_weak:
        typer.echo(f"{write_set} was not written; --accept-weak writes it all the same.", err=True)
        raise typer.Exit(FINDINGS)
    name = feature or feature_name(behaviour, kind)
    of = title or f"{behaviour}{f': {kind}' if kind else ''}"
    features = with_found(features, name, of, behaviour, chosen, evidence).with_norms(bounds, norms)
    save_feature_set(features, features.path)
    typer.echo(f"Wrote {name} ({chosen.form}) to {write_set}; next: saeguard features calibrate.")


def layers_to_read(layers: str | None, info: SaeInfo | None) -> tuple[list[int], list[int]]:
    """Return the layers of `--layers`, and those with the SAE's, in ascending order.

    Raises:
        InputError: the option is no list of layers, or there is neither it nor an SAE.
    """
    if layers is None:
        if info is None:
            raise InputError("found neither --sae nor --layers; give --layers 14,18,22 for probes")
        return [], [info.layer]
    parts = [part.strip() for part in layers.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise InputError(f"--layers: found {layers!r}; expected layers, such as 14,18,22")
    probed = sorted({int(part) for part in parts})
    return probed, sorted({*probed, *([] if info is None else [info.layer])})
