"""`saeguard features attribute`: choose clamp latents by what they cause."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saeguard.atomic_files import write_atomically
from saeguard.cli import attribute_prompt
from saeguard.cli.attribute_prompt import AgainstOption, StepsOption, TargetOption
from saeguard.cli.on_prompt import CompletionOption, IndexOption, load_all
from saeguard.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    ModelOptions,
    SaeOption,
    SetOption,
    existing_file,
    sae_and_set,
)
from saeguard.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from saeguard.effect.attribute import Candidate, Effect, Scored
    from saeguard.sae import SaeInfo


def verb(
    model: ModelOption,
    set_: SetOption = None,
    sae: SaeOption = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Prompts with completions of both labels (JSON lines), to choose on.",
            callback=existing_file,
        ),
    ] = None,
    holdout: Annotated[
        Path | None,
        typer.Option(
            help="The same of other templates (JSON lines), to try the edits on.",
            callback=existing_file,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="For --data: report to write, JSON.")] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="One prompt in place of --data: what each latent and token does to it."),
    ] = None,
    completion: CompletionOption = "",
    target: TargetOption = None,
    against: AgainstOption = None,
    steps: StepsOption = 0,
    most: Annotated[int, typer.Option(help="For --prompt: entries to show.", min=1)] = 20,
    index: IndexOption = None,
    top: Annotated[
        int, typer.Option(help="For --data: latents to try for each kind of edit.", min=1)
    ] = 6,
    most_texts: Annotated[
        int, typer.Option(help="Texts to read of each file; the first ones.", min=2)
    ] = 400,
    longest: Annotated[int, typer.Option(help="Leave out texts of more tokens.", min=2)] = 512,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Rank latents by their effect on a prompt's next token, or on preferring label 1.

    With --prompt, the effect of each latent and token on the logit of --target less that of
    --against, by gradient times activation; `features ablate` checks it. With --data, the same on
    pairs of completions: each edit is then made and measured on --holdout. The effect is in nats
    per token; negative: the edit makes label 1 less likely than label 0.
    """
    options = ModelOptions(dtype, device)
    if prompt is not None:
        if data is not None or holdout is not None or out is not None:
            raise InputError("--prompt: expected no --data, --holdout or --out beside it")
        loaded = load_all(model, sae, set_, index, options)
        attribute_prompt.attribute(
            loaded, prompt, completion, target, against, steps, most, as_json=as_json
        )
        return
    if data is None or holdout is None or out is None:
        raise InputError(
            "there is nothing to attribute; give --prompt and --target, or --data, --holdout and "
            "--out"
        )
    _pairs(
        model, sae_and_set(sae, set_)[0], (data, holdout), out, top, most_texts, longest, options
    )


def _pairs(
    model: Path,
    info: SaeInfo,
    files: tuple[Path, Path],
    out: Path,
    top: int,
    most_texts: int,
    longest: int,
    options: ModelOptions,
) -> None:
    """Rank latents on the pairs of the first file, and try the best on those of the second."""
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

    data, holdout = files
    if info.k is not None:
        raise InputError(
            f"{info.path}: its latents compete (TopK), so that none has an effect by itself"
        )
    asked = [read_prompts(path, completion=True) for path in (data, holdout)]
    shared = {p.template for p in asked[0]} & {p.template for p in asked[1]}
    if shared:
        raise InputError(
            f"{holdout}: shares {len(shared)} templates with {data}, such as {min(shared)!r}; "
            "expected others, so that nothing is measured on what it was chosen on"
        )
    lm = load_model(model, **options._asdict())
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
