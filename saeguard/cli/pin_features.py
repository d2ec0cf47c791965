"""`saeguard features pin`: write the digests of what a feature set rests on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from saeguard.cli.options import existing_file
from saeguard.errors import InputError


def verb(
    set_: Annotated[Path, typer.Option("--set", help="Feature-set file.", callback=existing_file)],
    model: Annotated[
        Path | None,
        typer.Option(help="Folder of the model that the set was calibrated with."),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Type of its weights at that time. Default: as the set says."),
    ] = None,
    quantization: Annotated[
        str | None,
        typer.Option(help="How they were quantised, as in the model's config.json."),
    ] = None,
) -> None:
    """Write the digests of model, SAE and configuration that a feature set lacks.

    `features calibrate` pins them itself; this is for sets from before, which then need not be
    calibrated again. A digest that the set has is compared, never replaced. Exit codes: 0 written,
    2 a digest differs.
    """
    from saeguard.features.load import load_feature_set, pin, save_feature_set
    from saeguard.features.model_fit import check_fit, read_shape
    from saeguard.features.model_identity import weights_sha256

    features = load_feature_set(set_)
    known = features.model
    if model is not None:
        check_fit(known, read_shape(model), model, at=str(set_))
        known = replace(known, sha256=weights_sha256(model))
        if known.sha256 is None:
            raise InputError(f"--model: {model} has no weights in safetensors files")
    for name, given in (("dtype", dtype), ("quantization", quantization)):
        if given is not None and getattr(known, name) not in {None, given}:
            raise InputError(f"--{name}: found {given}, but {set_} has {getattr(known, name)}")
    known = replace(
        known,
        dtype=dtype or known.dtype,
        quantization=quantization or known.quantization,
    )
    sae = None if features.sae is None else pin(features.sae)
    save_feature_set(replace(features, model=known, sae=sae), set_)
    typer.echo(f"Wrote {set_}.")
