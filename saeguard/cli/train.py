"""`saeguard sae train`: train an SAE on a model's residual stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from saeguard.training.run import Shown

Dtype = Literal["float32", "bfloat16", "float16"]
Texts = Annotated[
    list[Path],
    typer.Option(help="JSON lines with text, messages or prompt; other files are one text each."),
]
Model = Annotated[str, typer.Option(help="Folder of a model, or its name on the hub.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]


def train(
    model: Model,
    layer: Annotated[int, typer.Option(help="Block whose output is read.", min=0)],
    texts: Texts,
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint.")],
    latents: Annotated[int, typer.Option(help="Latents of the SAE.", min=1)] = 8192,
    tokens: Annotated[int, typer.Option(help="Tokens to train on.", min=1)] = 5_000_000,
    kind: Annotated[
        Literal["batchtopk", "jumprelu"], typer.Option(help="What makes latents sparse.")
    ] = "batchtopk",
    k: Annotated[int, typer.Option(help="Latents that fire on a token, on average.", min=1)] = 32,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a run that was cut off.")
    ] = False,
    record: Annotated[
        Path | None, typer.Option(help="Record residuals in this folder first, or use those there.")
    ] = None,
    record_dtype: Annotated[Dtype, typer.Option(help="Of the recorded residuals.")] = "float16",
    dtype: Annotated[Dtype, typer.Option(help="Of the saved matrices.")] = "float32",
    batch: Annotated[int, typer.Option(help="Tokens of a step.", min=1)] = 2048,
    lr: Annotated[float, typer.Option(help="Learning rate.", min=0)] = 5e-4,
    context: Annotated[int, typer.Option(help="Tokens at which texts are cut.", min=2)] = 512,
    buffer: Annotated[int, typer.Option(help="Tokens that are shuffled together.", min=1)] = 65536,
    seed: Annotated[int, typer.Option(help="Of weights and order.", min=0)] = 0,
    device: Device = "auto",
    model_dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Of the model's weights. Default: float32 on a CPU, bfloat16 elsewhere. bfloat16 "
            "is faster on a CPU with AMX.",
        ),
    ] = None,
    save_every: Annotated[
        float, typer.Option(help="Seconds between checkpoints.", min=0, hidden=True)
    ] = 60.0,
) -> None:
    """Train an SAE on one layer of a model; a run that is cut off goes on with --resume.

    The result is a SAELens checkpoint with `card.json`. Special tokens and tokens of massive norm
    are left out and counted.
    """
    from importlib.util import find_spec

    from saeguard.hf.model import choose_device
    from saeguard.hf.model_folder import model_folder
    from saeguard.training.errors import TrainingCannotRunError
    from saeguard.training.model import open_model
    from saeguard.training.run import Options, is_trained, run
    from saeguard.training.settings import Settings
    from saeguard.training.texts import read_chunks

    if is_trained(out):
        typer.echo(f"{out}: already trained; remove it, or give another --out, to train again")
        return
    if find_spec("sae_lens") is None:
        raise TrainingCannotRunError(
            "training needs sae_lens, which is not installed: pip install 'saeguard[train]'"
        )
    chosen = choose_device(device)
    lm = open_model(model_folder(model), chosen, model_dtype)
    chunks = read_chunks(texts, lm.tokenizer, context)
    settings = Settings(
        model=model,
        layer=layer,
        d_in=lm.hidden_size,
        latents=latents,
        tokens=tokens,
        kind=kind,
        k=k,
        batch=batch,
        lr=lr,
        seed=seed,
        texts_sha256=chunks.files,
        context=context,
        buffer=buffer,
        recorded=record_dtype if record else "",
        model_dtype=model_dtype or "",
    )
    options = Options(
        out, resume=resume, recording=record, dtype=dtype, device=chosen, save_every=save_every
    )
    with _bars(tokens) as shown:
        card = run(settings, options, lm, chunks, shown)
    last = card["last_block"]
    typer.echo(
        f"{out}: {latents} latents of layer {layer}, L0 {last['l0']:.1f}, explained variance "
        f"{last['explained_variance']:.3f}, {card['dead_at_the_end']} dead, from "
        f"{card['tokens_trained']} tokens of {card['texts']} texts"
    )


@contextmanager
def _bars(tokens: int) -> Iterator[Shown]:
    """Show progress on the terminal's error stream."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from saeguard.training.run import Shown
    from saeguard.training.train import Progress as Trained

    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[told]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    task = bar.add_task("start", total=None, told="")

    def stage(name: str) -> None:
        bar.reset(task, description=name, total=None, told="")

    def recorded(done: int) -> None:
        bar.update(task, total=tokens, completed=done, told=f"{done} tokens")

    def trained(now: Trained) -> None:
        bar.update(
            task,
            total=now.steps,
            completed=now.step,
            told=f"loss {now.loss:.4f} L0 {now.l0:.1f} dead {now.dead:.1%} "
            f"{now.tokens_per_second:.0f} tokens/s",
        )

    with bar:
        yield Shown(stage, recorded, trained)
