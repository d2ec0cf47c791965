"""`saeguard features neighbours`: latents whose rows point the same way."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from saeguard.cli.on_prompt import IndexOption, named, open_index
from saeguard.cli.options import JsonOption, SaeOption, SetOption, existing_folder, sae_and_set
from saeguard.cli.records import number, show, tokens, word


def verb(
    latent: Annotated[int, typer.Argument(help="Number of the latent.", min=0)],
    set_: SetOption = None,
    sae: SaeOption = None,
    side: Annotated[
        Literal["decoder", "encoder"],
        typer.Option(help="Rows to compare: what latents write, or what they read."),
    ] = "decoder",
    other: Annotated[
        Path | None,
        typer.Option(
            help="Look in this SAE instead, of another size or layer: what the latent splits into.",
            callback=existing_folder,
        ),
    ] = None,
    most: Annotated[int, typer.Option(help="Number of neighbours.", min=1)] = 20,
    index: IndexOption = None,
    map_: Annotated[
        bool,
        typer.Option("--map", help="With --json: places on a plane, by UMAP; takes seconds."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show the latents whose decoder or encoder rows are nearest by cosine.

    No model is needed. The second column holds the cosine of the other side of the same two
    latents: rows may write the same way and read different things.
    """
    from saeguard.latents.neighbours import cosines, flat_map, neighbours, unit_rows
    from saeguard.sae import inspect

    info, features = sae_and_set(sae, set_)
    opened = None if other else open_index(index, info)
    among = info if other is None else inspect(other)
    found = neighbours(info, latent, side=side, other=None if other is None else among, most=most)
    back: Literal["decoder", "encoder"] = "encoder" if side == "decoder" else "decoder"
    crossed = cosines(among, unit_rows(info, [latent], back), back)[0]
    rows: list[dict[str, Any]] = [
        {"latent": n.latent, side: round(n.cosine, 4), back: round(float(crossed[n.latent]), 4)}
        for n in found
    ]
    rows = named(rows, None if other else features, opened)
    report: dict[str, Any] = {
        "latent": latent,
        "sae": {"sha256": info.sha256, "layer": info.layer},
        "other": None if other is None else {"sha256": among.sha256, "layer": among.layer},
        "neighbours": rows,
    }
    if map_:
        import torch

        own = unit_rows(info, [latent], side)
        near = unit_rows(among, [n.latent for n in found], side)
        places = flat_map(torch.cat([own, near])).round(4).tolist()
        report["map"] = [
            {"latent": number, "x": x, "y": y}
            for number, (x, y) in zip([latent, *(n.latent for n in found)], places, strict=True)
        ]
    columns = [
        ("latent", word("latent")),
        (f"{side} cosine", number(side, ".3f")),
        (f"{back} cosine", number(back, ".3f")),
        ("features", word("features")),
        ("makes likelier", tokens("tokens")),
    ]
    show(report, rows, columns, as_json=as_json)
