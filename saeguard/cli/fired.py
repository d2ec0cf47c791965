"""`saeguard features fired`: the strongest latents of the whole SAE, token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saeguard.cli.options import DeviceOption, DtypeOption, ModelOption, existing_file
from saeguard.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from saeguard.features.types import FeatureSet

Fired = list[tuple[int, float]]
"""One token's latents with their activations, strongest first."""


def verb(
    set_: Annotated[
        Path,
        typer.Option(
            "--set",
            help="Feature-set file: its SAE is used, its features are named.",
            callback=existing_file,
        ),
    ],
    model: ModelOption,
    prompt: Annotated[str, typer.Option(help="The user's message.")] = "",
    completion: Annotated[str, typer.Option(help="The model's answer.")] = "",
    token: Annotated[
        list[int] | None,
        typer.Option(
            help="Show this position only, counted from 0 as in events. Repeatable. Default: all."
        ),
    ] = None,
    most: Annotated[
        int, typer.Option(help="Number of latents to show for each token.", min=1)
    ] = 10,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Show the strongest latents of the whole SAE at each token of a text.

    An event names only the features that policies read, and holds no text. With the text at hand,
    this shows every other latent that fired on the same tokens.
    """
    from saeguard.features.load import load_feature_set, sae_of
    from saeguard.hf.model import check_model, load_model
    from saeguard.hf.residuals import record
    from saeguard.hf.texts import make_turn
    from saeguard.sae import what_fired

    if not (prompt or completion):
        raise InputError("there is no text; give --prompt, --completion or both")
    features = load_feature_set(set_)
    sae = sae_of(features)
    lm = load_model(model, dtype=dtype, device=device)
    check_model(lm, features)
    text = make_turn("text", lm.tokenizer, prompt, completion)
    positions = range(len(text.tokens)) if token is None else token
    outside = [i for i in positions if not 0 <= i < len(text.tokens)]
    if outside:
        raise InputError(f"--token {outside[0]}: the text has tokens 0 to {len(text.tokens) - 1}")
    ((_, residuals),) = record(lm, [text.tokens], [sae.layer])
    x = residuals[sae.layer][list(positions)]
    found = what_fired(sae.inspect(), x, most=most)
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
    """Return one record for each token, for JSON."""
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
