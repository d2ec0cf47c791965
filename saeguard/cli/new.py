"""`saeguard policy new`: start a policy and its tests."""

from __future__ import annotations

import json
import math
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saeguard.atomic_files import write_new
from saeguard.cli.failures import BAD_INPUT, stop, told
from saeguard.cli.feature_folder import FEATURE_SETS, FeatureSetsOption, read_feature_sets

if TYPE_CHECKING:
    from saeguard.cli.feature_folder import FeatureSets

TEMPLATE_SHARE = 0.5
"""Threshold to write where nobody has calibrated one."""


def verb(
    id_: Annotated[
        str, typer.Argument(metavar="ID", help="Such as unsafe-code.shell-injection: its place.")
    ],
    set_: Annotated[str, typer.Option("--set", help="Feature set it takes its features from.")],
    feature: Annotated[
        list[str] | None,
        typer.Option(help="Feature to watch; may be given again, then all have to hold."),
    ] = None,
    folder: Annotated[Path, typer.Option(help="Folder of policies.")] = Path("policies"),
    feature_sets: FeatureSetsOption = FEATURE_SETS,
) -> None:
    """Write a policy and its tests, with marks where their owner has to say something.

    It is in shadow, its tests pass, and `saeguard check` tells what is still to do. Files that are
    there already are never touched. Exits with 0, 2 where the command is wrong, 3 where the files
    cannot be written.
    """
    from saeguard.policy.schema import FORMS, POLICY_ID
    from saeguard.policy_tools.scaffold import draft

    if not re.fullmatch(POLICY_ID, id_):
        stop(f"{id_!r} is no id; write {FORMS[POLICY_ID]}", BAD_INPUT)
    with told():
        thresholds = chosen(read_feature_sets(feature_sets), set_, feature or [])
        path = folder.joinpath(*id_.split(".")).with_suffix(".yaml")
        tests = path.with_suffix(".test.yaml")
        there = [str(file) for file in (path, tests) if os.path.lexists(file)]
        if there:
            stop(
                f"{' and '.join(there)}: there already; choose another id, or edit that", BAD_INPUT
            )
        schema = os.path.relpath(folder, path.parent)
        texts = draft(
            id_, set_, thresholds, f"{Path(schema).as_posix()}/", datetime.now(UTC).date()
        )
        write_new(dict(zip((path, tests), texts, strict=True)) | missing_schemas(folder))
    typer.echo(f"Written: {path} and {tests.name}. `saeguard check {path}` tells what is to do.")


def chosen(sets: FeatureSets, name: str, features: list[str]) -> dict[str, float]:
    """Return the features to watch with a threshold each, the calibrated one where there is one."""
    from saeguard.policy.errors import did_you_mean

    known = sets.known.get(name)
    available = known or sets.templates.get(name)
    if available is None:
        there = [*sets.known, *sets.templates]
        hint = did_you_mean(name, there)
        stop(f"there is no feature set {name!r}; {hint}there are: {', '.join(there)}", BAD_INPUT)
    for feature in features:
        if feature not in available.features:
            hint = did_you_mean(feature, available.features)
            stop(f"{name} has no feature {feature!r}; {hint}there are: "
                 f"{', '.join(available.features)}", BAD_INPUT)  # fmt: skip
    picked = list(dict.fromkeys(features)) or [next(iter(available.features))]
    if known is None:
        return dict.fromkeys(picked, TEMPLATE_SHARE)
    return {f: math.ceil(known.features[f].threshold * 1000) / 1000 for f in picked}


def missing_schemas(folder: Path) -> dict[Path, str]:
    """Return the JSON Schemas that the files point their editors to, where they are not there."""
    from saeguard.policy import schema
    from saeguard.policy_tools import test_case_schema

    schemas = {
        "saeguard.policy.v1.json": schema.json_schema(),
        "saeguard.test.v1.json": test_case_schema.json_schema(),
    }
    return {
        folder / name: json.dumps(content, indent=2) + "\n"
        for name, content in schemas.items()
        if not os.path.lexists(folder / name)
    }
