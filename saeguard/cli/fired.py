"""`saeguard features fired`: every latent that fires on a text, token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saeguard.cli.files import mistakes_told

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from saeguard.features.types import FeatureSet

Fired = list[tuple[int, float]]
"""One token's latents with their activations, strongest first."""


def verb(
    set_: Annotated[
        Path, typer.Option("--set", help="Feature set: its SAE is read, its latents are named.")
    ],
    model: Annotated[Path, typer.Option(help="Folder of a Hugging Face model.", exists=True)],
    prompt: Annotated[str, typer.Option(help="What the model is given.")] = "",
    completion: Annotated[str, typer.Option(help="What it says.")] = "",
    token: Annotated[
        list[int] | None, typer.Option(help="Only this position, as events count. Repeatable.")
    ] = None,
    most: Annotated[int, typer.Option(help="Strongest latents of each token.", min=1)] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what else fired on a token: the strongest latents of the whole SAE.

    An event names a request's features and where each was highest, but holds no text. With the text
    at hand, this shows the same tokens under every latent of the checkpoint.
    """
    from saeguard.features.load import load_feature_set
    from saeguard.hf.model import check_model, load_model
    from saeguard.hf.residuals import record
    from saeguard.hf.texts import TextError, make_turn
    from saeguard.sae import what_fired

    if not (prompt or completion):
        raise typer.BadParameter("there is no text; give --prompt, --completion or both")
    with mistakes_told():
        features = load_feature_set(set_)
        lm = load_model(model)
        check_model(lm, features)
        text = make_turn("text", lm.tokenizer, prompt, completion)
        positions = range(len(text.tokens)) if token is None else token
        outside = [i for i in positions if not 0 <= i < len(text.tokens)]
        if outside:
            raise TextError(
                f"--token {outside[0]}: the text has tokens 0 to {len(text.tokens) - 1}"
            )
        ((_, residuals),) = record(lm, [text.tokens], [features.sae.layer])
        x = residuals[features.sae.layer][list(positions)]
        found = what_fired(features.sae.inspect(), x, most=most)
    pieces = [lm.tokenizer.decode([text.tokens[i]]) for i in positions]
    names = named(features)
    if as_json:
        typer.echo(json.dumps(as_records(positions, pieces, found, names), indent=2))
    else:
        _print(positions, pieces, found, names)


def named(features: FeatureSet) -> Mapping[int, list[str]]:
    """Return the names of the features that each latent is part of."""
    names: dict[int, list[str]] = {}
    for name, feature in features.features.items():
        for term in feature.detect:
            names.setdefault(term.latent, []).append(name)
    return names


def as_records(
    positions: Sequence[int],
    pieces: Sequence[str],
    found: Sequence[Fired],
    names: Mapping[int, list[str]],
) -> list[dict[str, Any]]:
    """Return one object a token, for programs."""
    return [
        {
            "at": at,
            "token": piece,
            "latents": [
                {"latent": latent, "activation": value, "features": names.get(latent, [])}
                for latent, value in fired
            ],
        }
        for at, piece, fired in zip(positions, pieces, found, strict=True)
    ]


def _print(
    positions: Sequence[int],
    pieces: Sequence[str],
    found: Sequence[Fired],
    names: Mapping[int, list[str]],
) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("at", "token", "latents, strongest first: activation (feature)")
    for at, piece, fired in zip(positions, pieces, found, strict=True):
        line = Text(", ").join(
            Text(f"{latent}: {value:.3g}").append(
                f" ({', '.join(names[latent])})" if latent in names else "", style="bold"
            )
            for latent, value in fired
        )
        table.add_row(str(at), repr(piece), line)
    Console().print(table)
