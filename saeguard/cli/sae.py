"""`saeguard sae`: look at, fetch and convert SAE checkpoints."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saeguard.cli.files import mistakes_told

if TYPE_CHECKING:
    from saeguard.sae import SaeInfo, Stated
    from saeguard.sae.hub import HubRef
    from saeguard.sae.l0 import L0

verb = typer.Typer(
    help="Look at an SAE checkpoint, fetch one by name, convert pickles and npz to rows.",
    no_args_is_help=True,
)

_Layer = Annotated[int | None, typer.Option(help="Block whose output is read.", min=0)]
_K = Annotated[int | None, typer.Option(help="Latents that TopK keeps.", min=1)]
_Factor = Annotated[
    float | None, typer.Option("--norm-factor", help="Of `expected_average_only_in`.")
]
_Convention = Annotated[
    str | None, typer.Option(help="Reading of Llama Scope: openmoss (default) or saelens.")
]
UNITS = {"GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10}
PER_TOKEN = {
    "none": "nothing, the residual is read as it is",
    "layer_norm": "layer norm over the residual",
    "constant_norm_rescale": "the residual is brought to the norm sqrt(d_in)",
}
TOKENS_A_PIECE = 256
EXACT_RANKS = "exact, unless a feature set says `topk: approximate`: inspect that file"


@verb.command()
def inspect(
    path: Annotated[
        Path, typer.Argument(help="Folder of the checkpoint, or a feature set that names one.")
    ],
    text: Annotated[
        Path | None, typer.Option(help="Text to measure how many latents fire.", exists=True)
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Folder of the model that reads it.", exists=True)
    ] = None,
    l0: Annotated[float | None, typer.Option(help="Published L0, where no file has it.")] = None,
    latents: Annotated[int, typer.Option(help="Size of the watch list to reckon.", min=1)] = 64,
    layer: _Layer = None,
    k: _K = None,
    norm_factor: _Factor = None,
    convention: _Convention = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a checkpoint is, what is folded, what it costs, and whether it fires as published.

    Exits with 1 where it cannot be read rightly, or where it does not look like what it claims.
    """
    from saeguard.sae import SaeError
    from saeguard.sae import inspect as read

    with mistakes_told():
        if (text is None) != (model is None):
            raise SaeError("--text and --model belong together")
        if l0 is not None and not 0 < l0 < math.inf:
            raise SaeError(f"--l0 is {l0}; give a finite number above 0")
        stated = _stated(layer, k, norm_factor, convention)
        ranks = None
        if path.suffix == ".yaml":
            path, stated, ranks = _named_by(path, stated)
        info = read(path, stated)
        found = _measure(info, text, model, l0) if text and model else None
        facts = _facts(info, latents)
        if info.k is not None:
            facts["ranks"] = ranks or EXACT_RANKS
    if as_json:
        typer.echo(json.dumps(facts | ({"l0": _l0_json(found)} if found else {}), indent=2))
    else:
        _print(facts, found)
    if found is not None and "does not look like" in found.verdict:
        raise typer.Exit(1)


@verb.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A .pt, .pth or .bin file, or a folder.")],
    out: Annotated[Path, typer.Argument(help="New folder.")],
    config: Annotated[Path | None, typer.Option(help="Of a pickle, if not beside it.")] = None,
    revision: Annotated[str | None, typer.Option(help="Of its repository, for the record.")] = None,
    layer: _Layer = None,
    k: _K = None,
    norm_factor: _Factor = None,
    convention: _Convention = None,
) -> None:
    """Write a checkpoint as rows that are read at once, with its digest and provenance.

    A pickle is read in a process of its own, by torch's weights-only loader, without network.
    """
    from saeguard.sae.convert import convert as write

    with mistakes_told():
        stated = _stated(layer, k, norm_factor, convention)
        info = write(source, out, stated=stated, config=config, revision=revision)
        typer.echo(f"{info.format}, {info.d_sae} latents of layer {info.layer}, in {out}")
        typer.echo(f"sha256: {info.sha256}")


@verb.command()
def fetch(
    release: Annotated[str, typer.Argument(help="Release, or OWNER/NAME of a repository.")],
    id_: Annotated[str, typer.Argument(metavar="ID", help="Of one SAE, or its folder.")],
    file: Annotated[
        list[str] | None, typer.Option(help="Of a repository: files in the folder, weights first.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Commit. Default: the newest.")] = None,
    layer: _Layer = None,
    k: _K = None,
) -> None:
    """Download one SAE, convert it where it is a pickle, and print what to pin."""
    from saeguard.sae.convert import convert as write
    from saeguard.sae.hub import HubRef, commit_of, download, named
    from saeguard.sae.hub import fetch as found

    with mistakes_told():
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
    from saeguard.sae import SaeError, Stated

    if convention not in {None, "openmoss", "saelens"}:
        raise SaeError(f"--convention is {convention!r}; known: openmoss, saelens")
    if norm_factor is not None and not 0 < norm_factor < math.inf:
        raise SaeError(f"--norm-factor is {norm_factor}; give a finite number above 0")
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


def _measure(info: SaeInfo, text: Path, model: Path, published: float | None) -> L0:
    import torch

    from saeguard.features.model_fit import sae_misfit
    from saeguard.hf.model import load_model
    from saeguard.hf.residuals import record
    from saeguard.sae import SaeError
    from saeguard.sae.l0 import measure_l0

    try:
        content = text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SaeError(f"{text}: this is not UTF-8; give a file of plain text") from error
    lm = load_model(model)
    misfit = sae_misfit(info.d_in, info.layer, lm.shape)
    if misfit:
        raise SaeError(f"{model}: {misfit}; name the model that it was trained on")
    ids = lm.tokenizer(content)["input_ids"]
    pieces = [ids[i : i + TOKENS_A_PIECE] for i in range(0, len(ids), TOKENS_A_PIECE)]
    kept = []
    for i, residuals in record(lm, pieces, [info.layer]):
        special = torch.tensor([token in lm.special_tokens for token in pieces[i]])
        kept.append(residuals[info.layer][~special])
    x = torch.cat(kept or [torch.empty(0, info.d_in)])
    if not len(x):
        raise SaeError(f"{text}: no text")
    return measure_l0(info, x, published)


def _named_by(file: Path, stated: Stated) -> tuple[Path, Stated, str]:
    """Return the checkpoint that a feature set names, what is stated of it, and how it ranks."""
    from saeguard.features.load import load_feature_set
    from saeguard.sae import SaeError, Stated

    if stated != Stated():
        raise SaeError(f"{file}: a feature set states layer, k, factor and convention itself")
    sae = load_feature_set(file).sae
    how = "exact" if sae.approximation is None else sae.approximation.told
    return sae.path, replace(sae.stated, layer=sae.layer), how


def _facts(info: SaeInfo, latents: int) -> dict[str, Any]:
    from saeguard.sae.l0 import published_l0

    row = 4 * (info.d_in + 5)
    return {
        "path": str(info.path),
        "family": info.format,
        "architecture": info.architecture,
        "activation": info.activation,
        "k": info.k,
        "model": info.model,
        "hook_point": f"resid_post of block {info.layer}",
        "layer": info.layer,
        "d_in": info.d_in,
        "d_sae": info.d_sae,
        "dtype": info.dtype,
        "per_token_norm": info.norm,
        "transcoder": info.transcoder,
        "folded": list(info.folded),
        "published_l0": published_l0(info),
        "watched": {
            "latents": latents,
            "encoder_bytes": latents * row,
            "clamped_bytes": latents * 4 * info.d_in,
            "whole_encoder_bytes": info.d_sae * row,
        },
        "weights_bytes": info.weights.stat().st_size,
        "sha256": info.sha256,
        "config_sha256": info.config_sha256,
    }


def _l0_json(found: L0) -> dict[str, Any]:
    return {
        "mean": round(found.mean, 2),
        "median": found.median,
        "tokens": found.tokens,
        "published": found.published,
        "verdict": found.verdict,
    }


def _print(facts: dict[str, Any], found: L0 | None) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from saeguard.sae.l0 import by_construction

    watched = {
        name: _size(bytes_) for name, bytes_ in facts["watched"].items() if name != "latents"
    }
    kept = f", k = {facts['k']}" if facts["k"] else ""
    rows = {
        "family": f"{facts['family']}, {facts['architecture']}",
        "reads": f"{facts['hook_point']} (counted from 0)"
        + (f" of {facts['model']}" if facts["model"] else ""),
        "size": f"d_in {facts['d_in']}, {facts['d_sae']} latents, {facts['dtype']}",
        "activation": f"{facts['activation']}{kept}",
        **({"ranks": facts["ranks"]} if "ranks" in facts else {}),
        "per token": PER_TOKEN[facts["per_token_norm"]],
        "folded": "\n".join(facts["folded"]) or "nothing",
        "clamps": "no: a transcoder writes elsewhere" if facts["transcoder"] else "yes",
        f"{facts['watched']['latents']} latents": (
            f"{watched['encoder_bytes']} to watch, {watched['clamped_bytes']} more to clamp "
            f"(all of the encoder: {watched['whole_encoder_bytes']})"
        ),
    }
    if found is not None:
        rows["L0"] = (
            f"{found.mean:.1f} a token (median {found.median:g}) over {found.tokens} tokens\n"
            f"{found.verdict}"
        )
    elif facts["published_l0"] is not None:
        rows["L0"] = f"published: {facts['published_l0']:g}; --text and --model measure it"
    elif facts["k"]:
        rows["L0"] = by_construction(facts["k"])
    else:
        rows["L0"] = (
            "no file says it; --text and --model measure it, --l0 states what was published"
        )
    # A path and a digest are for copying: neither is wrapped.
    typer.echo(facts["path"])
    table = Table(show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, told in rows.items():
        table.add_row(name, Text(told))
    Console().print(table)
    typer.echo(f"sha256: {facts['sha256']}")


def _size(bytes_: int) -> str:
    unit = next((name for name, size in UNITS.items() if bytes_ >= size), "KiB")
    return f"{bytes_ / UNITS[unit]:.1f} {unit}"
