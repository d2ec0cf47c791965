"""`saeguard sae evaluate`: what an SAE's reconstruction keeps of its model's loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saeguard.cli.train import Device, Model, Texts

if TYPE_CHECKING:
    import numpy as np

    from saeguard.training.texts import Chunks


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of an SAE checkpoint.")],
    model: Model,
    texts: Texts,
    layer: Annotated[
        int | None, typer.Option(help="Block whose output is read, if no file says it.", min=0)
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to measure on.", min=1)] = 65536,
    context: Annotated[int, typer.Option(help="Tokens at which texts are cut.", min=2)] = 512,
    seed: Annotated[int, typer.Option(help="Of the choice of texts, and the baseline.")] = 0,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure loss recovered, L0, explained variance and dead latents beside a random decoder.

    The figures also go into the checkpoint's `card.json`. Use texts that the SAE was not trained
    on: the command warns if the card names one of the files.
    """
    from rich.console import Console

    from saeguard.hf.model import choose_device
    from saeguard.hf.model_folder import model_folder
    from saeguard.sae import Stated, inspect
    from saeguard.training.card import read_card, write_card
    from saeguard.training.errors import TrainingError
    from saeguard.training.evaluate import evaluate as measure
    from saeguard.training.model import open_model
    from saeguard.training.texts import read_chunks

    info = inspect(checkpoint, Stated(layer=layer))
    card = read_card(checkpoint)
    lm = open_model(model_folder(model), choose_device(device))
    if lm.hidden_size != info.d_in:
        raise TrainingError(
            f"{checkpoint}: d_in: found {info.d_in}, expected {lm.hidden_size}, the width of "
            f"{model}; name the model that the SAE was trained on"
        )
    if not 0 <= info.layer < len(lm.layers):
        raise TrainingError(
            f"{checkpoint}: layer: found {info.layer}, expected 0 to {len(lm.layers) - 1} for "
            f"{model}"
        )
    chunks = read_chunks(texts, lm.tokenizer, context)
    trained = set((card.get("training", {}).get("texts_sha256") or {}).values())
    for name, digest in chunks.files.items():
        if digest in trained:
            typer.echo(f"warning: {name}: the SAE was trained on this file", err=True)
    with Console(stderr=True).status("start") as status:
        found = measure(
            lm, info, _first(chunks, tokens, seed), seed=seed, report=status.update
        )  # fmt: skip
    found |= {
        "model": model,
        "layer": info.layer,
        "sha256": info.sha256,
        "texts_sha256": dict(chunks.files),
        "context": context,
        "seed": seed,
    }
    write_card(checkpoint, evaluation=found)
    found = read_card(checkpoint)["evaluation"]
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _print(found)


def _first(chunks: Chunks, tokens: int, seed: int) -> list[np.ndarray]:
    """Return texts in a shuffled order, as many as `tokens` takes."""
    out: list[np.ndarray] = []
    while len(out) < len(chunks) and sum(map(len, out)) < tokens:
        out.append(chunks.shuffled(len(out), seed))
    return out


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    loss, random = found["cross_entropy"], found["random_decoder"]
    table = Table("", "SAE", "random decoder", title=f"{found['tokens']} tokens")
    table.add_row("L0", f"{found['l0']:.1f}", f"{random['l0']}")
    table.add_row(
        "explained variance",
        f"{found['explained_variance']:.3f}",
        f"{random['explained_variance']:.3f}",
    )
    table.add_row(
        "next-token loss, spliced in", f"{loss['spliced']:.3f}", f"{loss['random_decoder']:.3f}"
    )
    table.add_row(
        "loss recovered", f"{found['loss_recovered']:.3f}", f"{random['loss_recovered']:.3f}"
    )
    table.add_row("dead latents", f"{found['dead_latents']}", "")
    console = Console()
    console.print(table)
    console.print(f"next-token loss: model {loss['model']:.3f}, zeros {loss['zero']:.3f}")
    console.print(f"latents by how often they fire: {found['density']}", highlight=False)
