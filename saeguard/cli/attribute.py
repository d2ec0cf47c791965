"""`saeguard features attribute`: choose clamp latents by what they cause."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saeguard.atomic_files import write_atomically
from saeguard.cli.options import (
    DeviceOption,
    DtypeOption,
    ModelOption,
    existing_file,
    existing_folder,
)
from saeguard.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from saeguard.effect.attribute import Candidate, Effect, Scored


def verb(
    model: ModelOption,
    sae: Annotated[
        Path, typer.Option(help="Folder of an SAE checkpoint.", callback=existing_folder)
    ],
    data: Annotated[
        Path,
        typer.Option(
            help="Prompts with completions of both labels (JSON lines), to choose on.",
            callback=existing_file,
        ),
    ],
    holdout: Annotated[
        Path,
        typer.Option(
            help="The same of other templates (JSON lines), to try the edits on.",
            callback=existing_file,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Report to write, JSON.")],
    top: Annotated[int, typer.Option(help="Latents to try for each kind of edit.", min=1)] = 6,
    most_texts: Annotated[
        int, typer.Option(help="Texts to read of each file; the first ones.", min=2)
    ] = 400,
    longest: Annotated[int, typer.Option(help="Leave out texts of more tokens.", min=2)] = 512,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
) -> None:
    """Rank latents by their effect on preferring label 1, and try the best ones.

    Chosen on --data by gradient times activation; each edit is then made and measured on --holdout.
    The effect is in nats per token; negative: the edit makes label 1 less likely than label 0.
    """
    from tqdm import tqdm

    from saeguard.effect.attribute import (
        attribute,
        candidates,
        log_probabilities,
        read_scored,
        try_edit,
    )
    from saeguard.effect.prompts import read_prompts
    from saeguard.hf.model import load_model
    from saeguard.sae import inspect

    info = inspect(sae)
    if info.k is not None:
        raise InputError(f"{sae}: its latents compete (TopK), so that none has an effect by itself")
    asked = [read_prompts(path, completion=True) for path in (data, holdout)]
    shared = {p.template for p in asked[0]} & {p.template for p in asked[1]}
    if shared:
        raise InputError(
            f"{holdout}: shares {len(shared)} templates with {data}, such as {min(shared)!r}; "
            "expected others, so that nothing is measured on what it was chosen on"
        )
    lm = load_model(model, dtype=dtype, device=device)
    search, held = (
        read_scored(lm, _first_questions(prompts, most_texts), longest) for prompts in asked
    )
    for path, texts in ((data, search), (holdout, held)):
        if not texts:
            raise InputError(f"{path}: no question with completions of both labels")
    excluded = lm.special_tokens
    with tqdm(total=len(search), desc="gradients", unit="text") as bar:
        found = attribute(lm, info, search, excluded, bar.update)
    tried: list[tuple[Candidate, Effect]] = []
    plain = log_probabilities(lm, held, info.layer)
    for c in tqdm(candidates(found, top), desc="edits", unit="latent"):
        target = {c.latent: 0.0 if c.how == "ablate" else c.height}
        tried.append((c, try_edit(lm, info, held, target, excluded, plain)))
    rows = [_row(c, effect) for c, effect in tried]
    report = {
        "model": lm.name,
        "sae": {"sha256": info.sha256, "layer": info.layer},
        "texts": {"search": len(search), "holdout": len(held)},
        "templates": {"search": _templates(search), "holdout": _templates(held)},
        "unit": "nats per token by which label 1 gains on label 0",
        "candidates": rows,
    }
    write_atomically(out, json.dumps(report, indent=1) + "\n")
    _print(rows)
    typer.echo(f"Wrote {out}.")


def _first_questions(prompts: Sequence[Any], most: int) -> list[Any]:
    """Return the first `most` prompts, with all completions of the last question."""
    kept = {p.question for p in prompts[:most]}
    return [p for p in prompts if p.question in kept]


def _templates(texts: Sequence[Scored]) -> int:
    return len({text.template for text in texts})


def _row(candidate: Candidate, effect: Effect) -> dict[str, Any]:
    change, count = effect.change, len(effect.change)
    error = float(change.std(ddof=1)) / count**0.5 if count > 1 else float("inf")
    mean = float(change.mean())
    return {
        "latent": candidate.latent,
        "edit": candidate.how,
        "height": round(candidate.height, 3),
        "rate": round(candidate.rate, 5),
        "predicted": round(candidate.predicted, 5),
        "z": round(candidate.z, 2),
        "measured": round(mean, 5),
        "standard_error": round(error, 5) if count > 1 else None,
        "loss": round(effect.loss, 5),
    }


def _print(rows: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "latent", "edit", "height", "fires on", "predicted", "measured", "± s.e.", "loss, both"
    )
    for row in rows:
        table.add_row(
            str(row["latent"]), row["edit"], f"{row['height']:g}", f"{row['rate']:.2%}",
            f"{row['predicted']:+.4f}", f"{row['measured']:+.4f}",
            f"{row['standard_error'] or 0:.4f}", f"{row['loss']:+.4f}",
        )  # fmt: skip
    Console().print(table)
