"""`saeguard sae`: inspect, download, convert, train and evaluate SAE checkpoints."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saeguard.cli import sae_latents
from saeguard.cli.evaluate_sae import evaluate
from saeguard.cli.failures import Verbs
from saeguard.cli.options import (
    DeviceOption,
    DtypeOption,
    ModelOptions,
    OptionalModel,
    existing_file,
    existing_folder,
)
from saeguard.cli.sae_report import facts_of, measure, records_of, show
from saeguard.cli.train import train
from saeguard.errors import FINDINGS, InputError

if TYPE_CHECKING:
    from saeguard.sae import Stated
    from saeguard.sae.hub import HubRef

verb = typer.Typer(
    cls=Verbs,
    help="Inspect, download, convert, train and evaluate SAE checkpoints.",
    no_args_is_help=True,
)
verb.command("train")(train)
verb.command("evaluate")(evaluate)

_Layer = Annotated[
    int | None,
    typer.Option(
        help="Block whose output the SAE reads, from 0. Default: as its files say.", min=0
    ),
]
_K = Annotated[
    int | None,
    typer.Option(help="Number of latents that TopK keeps. Default: as its files say.", min=1),
]
_Factor = Annotated[
    float | None,
    typer.Option("--norm-factor", help="Factor of the normalisation `expected_average_only_in`."),
]
_Convention = Annotated[
    str | None, typer.Option(help="For Llama Scope: openmoss or saelens. Default: openmoss.")
]
EXACT_RANKS = "exact, unless a feature set says `topk: approximate`: inspect that file"


@verb.command()
def inspect(
    path: Annotated[
        Path,
        typer.Argument(help="Folder of a checkpoint, or a feature-set file that names one."),
    ],
    text: Annotated[
        Path | None,
        typer.Option(
            help="Plain text to count active latents on (needs --model).", callback=existing_file
        ),
    ] = None,
    model: OptionalModel = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    l0: Annotated[
        float | None,
        typer.Option(help="Published L0, latents a token. Default: as the files say."),
    ] = None,
    latents: Annotated[
        int, typer.Option(help="Number of watched latents to compute the memory for.", min=1)
    ] = 64,
    index: Annotated[
        Path | None,
        typer.Option(
            help="Index that `features index` made: dead latents, and how often the others fire.",
            callback=existing_file,
        ),
    ] = None,
    beside: Annotated[
        Path | None,
        typer.Option(
            help="Another SAE of the model: which latents both have, and which split.",
            callback=existing_folder,
        ),
    ] = None,
    layer: _Layer = None,
    k: _K = None,
    norm_factor: _Factor = None,
    convention: _Convention = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Show what a checkpoint is and costs, and check that it fires as often as published.

    Exit codes: 0, 1 it does not fire as often as published, 2 a file or the command is wrong.
    """
    from saeguard.sae import inspect as read

    if (text is None) != (model is None):
        raise InputError("--text and --model: give both or neither")
    if l0 is not None and not 0 < l0 < math.inf:
        raise InputError(f"--l0: expected a finite number above 0, got {l0}")
    stated = _stated(layer, k, norm_factor, convention)
    ranks = sinks = None
    if path.suffix == ".yaml":
        path, stated, ranks, sinks = _named_by(path, stated)
    info = read(path, stated)
    found = measure(info, text, model, l0, ModelOptions(dtype, device)) if text and model else None
    facts = facts_of(info, latents)
    if info.k is not None:
        facts["ranks"] = ranks or EXACT_RANKS
    if sinks is not None:
        facts["attention_sinks"] = sinks
    if index is not None:
        facts["latents_on_corpus"] = sae_latents.density_of(index, info)
    if beside is not None:
        facts["beside"] = sae_latents.beside(beside, info)
    if as_json:
        typer.echo(json.dumps(facts | (records_of(found) if found else {}), indent=2))
    else:
        show(facts, found)
    if found is not None and "does not look like" in found.l0.verdict:
        raise typer.Exit(FINDINGS)


@verb.command()
def convert(
    source: Annotated[
        Path, typer.Argument(help="A .pt, .pth or .bin file, or a checkpoint folder.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to make; it must not exist.")],
    config: Annotated[
        Path | None, typer.Option(help="Configuration of a pickle. Default: config.json beside it.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Commit of its repository, to record.")
    ] = None,
    layer: _Layer = None,
    k: _K = None,
    norm_factor: _Factor = None,
    convention: _Convention = None,
) -> None:
    """Convert a checkpoint to safetensors with one row for each latent, and record its origin.

    A pickle is read by torch's weights-only loader, in a separate process without network. Exit
    codes: 0 written, 2 the checkpoint or the command is wrong, 3 the folder cannot be written.
    """
    from saeguard.sae.convert import convert as write

    stated = _stated(layer, k, norm_factor, convention)
    info = write(source, out, stated=stated, config=config, revision=revision)
    typer.echo(f"{info.format}, {info.d_sae} latents of layer {info.layer}, in {out}")
    typer.echo(f"sha256: {info.sha256}")


@verb.command()
def fetch(
    release: Annotated[
        str, typer.Argument(help="Name of a release, or OWNER/NAME of a repository.")
    ],
    id_: Annotated[
        str,
        typer.Argument(metavar="ID", help="Id of one SAE of a release, or folder in a repository."),
    ],
    file: Annotated[
        list[str] | None,
        typer.Option(help="For a repository: file in the folder. Repeatable, weights first."),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Commit to download. Default: the newest.")
    ] = None,
    layer: _Layer = None,
    k: _K = None,
) -> None:
    """Download one SAE, convert it if it is a pickle, and print the `sae:` section to pin it.

    Exit codes: 0, 2 a name or the checkpoint is wrong, 3 it cannot be downloaded.
    """
    from saeguard.sae.convert import convert as write
    from saeguard.sae.hub import HubRef, commit_of, download, named
    from saeguard.sae.hub import fetch as found

    if file:
        ref = HubRef(release, id_.strip("/"), tuple(file), revision or "main")
        name: dict[str, Any] = {"repo": release, "folder": id_, "files": file}
    else:
        ref = named(release, id_, revision)
        name = {"release": release, "id": id_}
    weights = download(ref)
    commit = commit_of(weights.parent) or ref.revision
    if ref.pickled:
        ref = replace(ref, revision=commit)
        if not ref.converted.is_dir():
            stated = _stated(layer, k, None, None)
            write(weights, ref.converted, stated=stated, revision=commit)
    _print_pin(ref, name, commit, _stated(layer, k, None, None), found(ref))


def _stated(
    layer: int | None, k: int | None, norm_factor: float | None, convention: str | None
) -> Stated:
    from saeguard.sae import Stated

    if convention not in {None, "openmoss", "saelens"}:
        raise InputError(f"--convention: expected openmoss or saelens, got {convention!r}")
    if norm_factor is not None and not 0 < norm_factor < math.inf:
        raise InputError(f"--norm-factor: expected a finite number above 0, got {norm_factor}")
    return Stated(layer, k, norm_factor, convention)  # type: ignore[arg-type]


def _print_pin(
    ref: HubRef, name: dict[str, Any], commit: str, stated: Stated, folder: Path
) -> None:
    """Print the `sae:` section of a feature set."""
    import yaml

    from saeguard.sae import inspect as read

    info = read(folder, stated)
    pinned = {
        **name,
        "revision": commit,
        "sha256": info.sha256,
        **({"config_sha256": info.config_sha256} if info.config_sha256 else {}),
        "layer": info.layer,
        "d_in": info.d_in,
        "d_sae": info.d_sae,
    }
    typer.echo(f"# {ref.repo}, in {folder}")
    typer.echo(yaml.safe_dump({"sae": pinned}, sort_keys=False))


def _named_by(file: Path, stated: Stated) -> tuple[Path, Stated, str, str]:
    """Return a feature set's checkpoint, and what the set states of it.

    The last two values are sentences: how its latents rank, and which attention sinks are left out.
    """
    from saeguard.features.load import load_feature_set, sae_of
    from saeguard.features.massive import left_out
    from saeguard.sae import Stated

    if stated != Stated():
        raise InputError(
            f"{file}: a feature set states layer, k, norm factor and convention itself; leave "
            "the options out"
        )
    features = load_feature_set(file)
    sae = sae_of(features)
    how = "exact" if sae.approximation is None else sae.approximation.in_words
    sinks = left_out(features.max_norm.get(sae.layer), features.norms.get(sae.layer))
    return sae.path, replace(sae.stated, layer=sae.layer), how, sinks
