"""`saeguard features drift`: how far features move under other arithmetic."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from saeguard.cli.feature_folder import read_feature_sets
from saeguard.cli.options import FEATURE_SETS, FeatureSetsOption, existing_file
from saeguard.cli.report import columns
from saeguard.errors import InputError


def verb(
    first: Annotated[
        Path,
        typer.Argument(
            help="Recording under the arithmetic of the calibration.", callback=existing_file
        ),
    ],
    second: Annotated[
        Path,
        typer.Argument(
            help="Recording of the same texts under that of serving.", callback=existing_file
        ),
    ],
    feature_sets: FeatureSetsOption = FEATURE_SETS,
    set_: Annotated[
        Path | None,
        typer.Option("--set", help="Feature set to write it into.", callback=existing_file),
    ] = None,
    served: Annotated[
        str | None,
        typer.Option(
            help="With --set: the arithmetic of the second recording, as the server's log names "
            "it, such as float32."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Measure how far each feature moves between two recordings of the same texts.

    Record them with `saeguard policy record`, once as the set was calibrated and once as it is
    served: another `--dtype`, a quantised model, another engine. With `--set` and `--served` the
    feature set records it, and a server says it at start instead of a warning. Exit codes: 0
    whatever moved, 2 the recordings do not belong together.
    """
    from saeguard.features.load import load_feature_set, save_feature_set
    from saeguard.policy_tools.drift import measure_drift, of_set
    from saeguard.policy_tools.recording import read_recording

    if (set_ is None) != (served is None):
        raise InputError("--set and --served: expected both or none, got one")
    known = read_feature_sets(feature_sets).known
    found = list(measure_drift(read_recording(first), read_recording(second), known))
    if set_ is not None and served is not None:
        features = load_feature_set(set_)
        drift = {**dict(features.model.drift), served: of_set(found, features.id)}
        model = replace(features.model, drift=tuple(sorted(drift.items())))
        save_feature_set(replace(features, model=model), set_)
    if as_json:
        typer.echo(json.dumps([d._asdict() for d in found], indent=2))
        return
    head = ("feature", "tokens", "mean", "99 %", "highest", "fired", "lost", "gained")
    rows = [
        (
            d.feature, f"{d.tokens}", f"{d.mean:.2g}", f"{d.p99:.2g}", f"{d.highest:.2g}",
            f"{d.fired}", f"{d.lost}", f"{d.gained}",
        )
        for d in found
    ]  # fmt: skip
    typer.echo("\n".join(columns([head, *rows])))
    typer.echo(
        "\nmean, 99 % and highest: absolute difference of the share. fired: tokens above the "
        "feature's threshold in the first recording; lost, gained: in one of the two only."
    )
