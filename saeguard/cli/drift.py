"""`saeguard features drift`: how far features move under other arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from saeguard.cli.feature_folder import read_feature_sets
from saeguard.cli.options import FEATURE_SETS, FeatureSetsOption, existing_file
from saeguard.cli.report import columns


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
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Measure how far each feature moves between two recordings of the same texts.

    Record them with `saeguard policy record`, once as the set was calibrated and once as it is
    served: another `--dtype`, a quantised model, another engine. Exit codes: 0 whatever moved, 2
    the recordings do not belong together.
    """
    from saeguard.policy_tools.drift import measure_drift
    from saeguard.policy_tools.recording import read_recording

    known = read_feature_sets(feature_sets).known
    found = list(measure_drift(read_recording(first), read_recording(second), known))
    if as_json:
        typer.echo(json.dumps([drift._asdict() for drift in found], indent=2))
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
