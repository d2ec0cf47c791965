"""What `saeguard sae inspect` finds out about a checkpoint, and how it prints it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from saeguard.cli.options import ModelOptions
from saeguard.cli.sae_latents import in_rows
from saeguard.errors import InputError

if TYPE_CHECKING:
    from saeguard.features.massive import MeasuredNorms
    from saeguard.sae import SaeInfo
    from saeguard.sae.l0 import L0

UNITS = {"GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10}
PER_TOKEN = {
    "none": "nothing, the residual is read as it is",
    "layer_norm": "layer norm over the residual",
    "constant_norm_rescale": "the residual is scaled to the norm sqrt(d_in)",
}
TOKENS_A_PIECE = 256


class Measured(NamedTuple):
    """What a text shows of a checkpoint and its layer."""

    l0: L0
    bound: float
    """Norm above which a token is an attention sink."""
    norms: MeasuredNorms


def measure(
    info: SaeInfo, text: Path, model: Path, published: float | None, options: ModelOptions
) -> Measured:
    """Count the latents that fire on the text that a model reads.

    Special tokens and attention sinks are left out.

    Raises:
        InputError: the text is empty or not UTF-8, or the model is not the SAE's.
        ModelError: the model cannot be loaded.
    """
    import numpy as np
    import torch

    from saeguard.features.massive import is_massive, measure_norms
    from saeguard.features.model_fit import sae_misfit
    from saeguard.hf.model import load_model
    from saeguard.hf.residuals import record
    from saeguard.sae.l0 import measure_l0

    try:
        content = text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"--text: {text}: not UTF-8; give a file of plain text") from error
    lm = load_model(model, **options._asdict())
    misfit = sae_misfit(info.d_in, info.layer, lm.shape)
    if misfit:
        raise InputError(f"--model: {model}: {misfit}; name the model that it was trained on")
    ids = lm.tokenizer(content)["input_ids"]
    pieces = [ids[i : i + TOKENS_A_PIECE] for i in range(0, len(ids), TOKENS_A_PIECE)]
    kept, positions = [], []
    for i, residuals in record(lm, pieces, [info.layer]):
        special = torch.tensor([token in lm.special_tokens for token in pieces[i]])
        kept.append(residuals[info.layer][~special])
        positions.append((~special).nonzero()[:, 0].numpy())
    if not sum(map(len, kept)):
        raise InputError(f"--text: {text}: the file holds no text")
    x = torch.cat(kept)
    norm = torch.linalg.vector_norm(x, dim=1).numpy()
    bound, norms = measure_norms(norm, np.concatenate(positions))
    ordinary = x[torch.from_numpy(~is_massive(norm, bound))]
    return Measured(measure_l0(info, ordinary, published), bound, norms)


def facts_of(info: SaeInfo, latents: int) -> dict[str, Any]:
    """Return what is known of a checkpoint, and the memory that watching `latents` of it takes."""
    from saeguard.sae.l0 import published_l0

    row = 4 * (info.d_in + 5)
    return {
        "path": str(info.path),
        "family": info.format,
        "architecture": info.architecture,
        "activation": info.activation,
        "k": info.k,
        "model": info.model,
        "hook_point": f"resid_post of block {info.layer}",
        "layer": info.layer,
        "d_in": info.d_in,
        "d_sae": info.d_sae,
        "dtype": info.dtype,
        "per_token_norm": info.norm,
        "transcoder": info.transcoder,
        "folded": list(info.folded),
        "published_l0": published_l0(info),
        "watched": {
            "latents": latents,
            "encoder_bytes": latents * row,
            "clamped_bytes": latents * 4 * info.d_in,
            "whole_encoder_bytes": info.d_sae * row,
        },
        "weights_bytes": info.weights.stat().st_size,
        "sha256": info.sha256,
        "config_sha256": info.config_sha256,
    }


def records_of(found: Measured) -> dict[str, Any]:
    """Return what was measured as records for JSON."""
    from saeguard.features.massive import norms_as_plain

    l0 = found.l0
    return {
        "l0": {
            "mean": round(l0.mean, 2),
            "median": l0.median,
            "tokens": l0.tokens,
            "published": l0.published,
            "verdict": l0.verdict,
        },
        "max_norm": found.bound,
        "norms_measured": norms_as_plain({0: found.norms})[0],
    }


def show(facts: dict[str, Any], found: Measured | None) -> None:
    """Print what is known of a checkpoint as a table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from saeguard.sae.l0 import by_construction

    watched = {
        name: _size(bytes_) for name, bytes_ in facts["watched"].items() if name != "latents"
    }
    kept = f", k = {facts['k']}" if facts["k"] else ""
    rows = {
        "family": f"{facts['family']}, {facts['architecture']}",
        "reads": f"{facts['hook_point']} (counted from 0)"
        + (f" of {facts['model']}" if facts["model"] else ""),
        "size": f"d_in {facts['d_in']}, {facts['d_sae']} latents, {facts['dtype']}",
        "activation": f"{facts['activation']}{kept}",
        **({"ranks": facts["ranks"]} if "ranks" in facts else {}),
        **({"attention sinks": facts["attention_sinks"]} if "attention_sinks" in facts else {}),
        "per token": PER_TOKEN[facts["per_token_norm"]],
        "folded": "\n".join(facts["folded"]) or "nothing",
        "clamps": "no: a transcoder writes to another place" if facts["transcoder"] else "yes",
        f"{facts['watched']['latents']} latents": (
            f"{watched['encoder_bytes']} to watch, {watched['clamped_bytes']} more to clamp "
            f"(all of the encoder: {watched['whole_encoder_bytes']})"
        ),
    }
    if found is not None:
        l0 = found.l0
        rows["L0"] = (
            f"{l0.mean:.1f} a token (median {l0.median:g}) over {l0.tokens} tokens\n{l0.verdict}"
        )
        rows["norms"] = found.norms.in_words(found.bound)
    elif facts["published_l0"] is not None:
        rows["L0"] = f"published: {facts['published_l0']:g}; --text and --model measure it"
    elif facts["k"]:
        rows["L0"] = by_construction(facts["k"])
    else:
        rows["L0"] = (
            "no file states it; --text and --model measure it, --l0 gives the published value"
        )
    rows |= in_rows(facts)
    # A path and a digest are for copying, so neither is wrapped.
    typer.echo(facts["path"])
    table = Table(show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text(value))
    Console().print(table)
    typer.echo(f"sha256: {facts['sha256']}")


def _size(bytes_: int) -> str:
    unit = next((name for name, size in UNITS.items() if bytes_ >= size), "KiB")
    return f"{bytes_ / UNITS[unit]:.1f} {unit}"
