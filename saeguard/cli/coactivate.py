"""`saeguard features coactivate`: what fires on the same tokens as a latent."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from saeguard.cli.on_prompt import named
from saeguard.cli.options import JsonOption, SetOption, existing_file
from saeguard.cli.records import number, show, tokens, word


def verb(
    latent: Annotated[int, typer.Argument(help="Number of the latent.", min=0)],
    index: Annotated[
        Path,
        typer.Option(help="Index that `features index` made.", callback=existing_file),
    ],
    set_: SetOption = None,
    least: Annotated[
        int, typer.Option(help="Leave out latents that share fewer tokens with it.", min=1)
    ] = 5,
    most: Annotated[int, typer.Option(help="Number of latents.", min=1)] = 20,
    as_json: JsonOption = False,
) -> None:
    """Show the latents that fire on the same tokens as a latent, by lift.

    Lift is how often both fire, over how often they would if they had nothing to do with each
    other. Counted on the index's sampled tokens.
    """
    from saeguard.features.load import load_feature_set
    from saeguard.latents.index import Index

    features = None if set_ is None else load_feature_set(set_, verify=False)
    opened = Index(index)
    found = opened.coactive(latent, least=least, most=most)
    rows = named(
        (
            {"latent": c.latent, "lift": round(c.lift, 3), "together": c.together,
             "tokens_fired": c.tokens}
            for c in found
        ),
        features,
        opened,
    )  # fmt: skip
    report = {"latent": latent, "sampled_tokens": opened.about["sampled"], "latents": rows}
    columns = [
        ("latent", word("latent")),
        ("lift", number("lift")),
        ("tokens, both", word("together")),
        ("tokens, this one", word("tokens_fired")),
        ("features", word("features")),
        ("makes likelier", tokens("tokens")),
    ]
    show(report, rows, columns, as_json=as_json)
