"""`saeguard features index`: what every latent does on a corpus, kept in one file."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saeguard.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    SaeOption,
    SetOption,
    sae_and_set,
)

if TYPE_CHECKING:
    from saeguard.latents.index import Index


def verb(
    texts: Annotated[
        list[Path],
        typer.Argument(help="Files of texts (JSON lines), or folders of them.", exists=False),
    ],
    model: ModelOption,
    out: Annotated[Path, typer.Option(help="Index to write, a DuckDB file.")],
    set_: SetOption = None,
    sae: SaeOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run that was cut off.")
    ] = False,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Read a corpus once and keep, for each latent, its texts, density and logit lens.

    With --set, the index also keeps how the set's features judge each text. Searches and `saeguard
    browse` read the index.
    """
    from tqdm import tqdm

    from saeguard.hf.model import load_model, load_tokenizer
    from saeguard.hf.text_files import check_file
    from saeguard.latents.build import Progress, build_index
    from saeguard.latents.index import Index

    info, features = sae_and_set(sae, set_)
    tokenizer = load_tokenizer(model)
    files = [check_file(path, tokenizer) for path in text_files(texts)]
    lm = load_model(model, tokenizer, dtype=dtype, device=device)
    _check_fit(lm, info, features)
    with ExitStack() as stack:
        read = stack.enter_context(
            tqdm(total=sum(file.count for file in files), desc="read", unit="text")
        )
        kept = stack.enter_context(tqdm(total=2 * info.d_sae, desc="index", unit="latent"))
        build_index(
            lm,
            info,
            files,
            out,
            features=features,
            resume=resume,
            progress=Progress(read.update, kept.update),
        )
    facts = summary(Index(out))
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    typer.echo(
        f"{facts['tokens']:,} tokens of {facts['texts']:,} texts; of {facts['latents']:,} latents "
        f"{facts['dead']:,} are dead ({facts['dead'] / facts['latents']:.1%}), a token has "
        f"{facts['l0']:.1f} on average"
    )
    typer.echo(f"Wrote {out}.")


def text_files(paths: list[Path]) -> list[Path]:
    """Return the files of texts, folders replaced by the `*.jsonl` files below them.

    Raises:
        InputError: a path is missing, or a folder holds none.
    """
    from saeguard.errors import InputError

    out = []
    for path in paths:
        if path.is_dir():
            found = sorted(path.rglob("*.jsonl"))
            if not found:
                raise InputError(f"{path}: the folder holds no *.jsonl file; name files of texts")
            out += found
        elif path.exists():
            out.append(path)
        else:
            raise InputError(f"{path}: there is no such file; name files of texts (JSON lines)")
    return out


def summary(index: Index) -> dict[str, Any]:
    """Return what an index holds, in a few figures."""
    ((dead, fired),) = index.rows("SELECT count(*) FILTER (tokens = 0), sum(tokens) FROM latent")
    ((texts,),) = index.rows("SELECT count(*) FROM text")
    return {
        "index": str(index.path),
        "model": index.about["model"],
        "layer": index.about["sae"]["layer"],
        "latents": index.d_sae,
        "tokens": index.tokens,
        "texts": texts,
        "dead": dead,
        "l0": round(int(fired) / max(1, index.tokens), 2),
    }


def _check_fit(lm: Any, info: Any, features: Any) -> None:
    from saeguard.errors import InputError
    from saeguard.features.model_fit import sae_misfit
    from saeguard.hf.model import check_model

    if features is not None:
        check_model(lm, features)
    misfit = sae_misfit(info.d_in, info.layer, lm.shape)
    if misfit:
        raise InputError(f"--model: {lm.path}: {misfit}; name the model that it was trained on")
