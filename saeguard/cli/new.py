"""`saeguard policy new`: a new policy file and its test file."""

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
from saeguard.cli.feature_folder import read_feature_sets
from saeguard.cli.options import FEATURE_SETS, FeatureSetsOption
from saeguard.errors import InputError

if TYPE_CHECKING:
    from saeguard.cli.feature_folder import FeatureSets

TEMPLATE_SHARE = 0.5
"""Threshold to write for a feature that is not calibrated."""


def verb(
    id_: Annotated[
        str,
        typer.Argument(
            metavar="ID", help="Id, such as unsafe-code.shell-injection; the dots become folders."
        ),
    ],
    set_: Annotated[
        str, typer.Option("--set", help="Name of the feature set that holds the features.")
    ],
    feature: Annotated[
        list[str] | None,
        typer.Option(help="Feature to watch. Repeatable: then all have to hold."),
    ] = None,
    folder: Annotated[Path, typer.Option(help="Folder of policies.")] = Path("policies"),
    feature_sets: FeatureSetsOption = FEATURE_SETS,
) -> None:
    """Write a new policy and its tests, with marks for what its owner has to fill in.

    The policy is in shadow mode, its tests pass, and `saeguard check` lists what is still to do.
    Existing files are never overwritten. Exit codes: 0 written, 2 the command is wrong, 3 the files
    cannot be written.
    """
    from saeguard.policy.schema import POLICY_ID
    from saeguard.policy_tools.scaffold import draft
    from saeguard.yaml_files.section import FORMS

    if not re.fullmatch(POLICY_ID, id_):
        raise InputError(f"{id_!r} is not a policy id; write {FORMS[POLICY_ID]}")
    thresholds = chosen(read_feature_sets(feature_sets), set_, feature or [])
    path = folder.joinpath(*id_.split(".")).with_suffix(".yaml")
    tests = path.with_suffix(".test.yaml")
    there = [str(file) for file in (path, tests) if os.path.lexists(file)]
    if there:
        raise InputError(
            f"{' and '.join(there)}: exists already; choose another id, or edit that file"
        )
    schema = os.path.relpath(folder, path.parent)
    texts = draft(id_, set_, thresholds, f"{Path(schema).as_posix()}/", datetime.now(UTC).date())
    write_new(dict(zip((path, tests), texts, strict=True)) | missing_schemas(folder))
    typer.echo(f"Wrote {path} and {tests.name}. `saeguard check {path}` lists what is still to do.")


def chosen(sets: FeatureSets, name: str, features: list[str]) -> dict[str, float]:
    """Return the features to watch, each with its calibrated threshold or `TEMPLATE_SHARE`."""
    from saeguard.yaml_files.findings import did_you_mean

    known = sets.known.get(name)
    available = known or sets.templates.get(name)
    if available is None:
        there = [*sets.known, *sets.templates]
        hint = did_you_mean(name, there)
        raise InputError(f"there is no feature set {name!r}; {hint}there are: {', '.join(there)}")
    for feature in features:
        if feature not in available.features:
            hint = did_you_mean(feature, available.features)
            raise InputError(f"{name} has no feature {feature!r}; {hint}there are: "
                 f"{', '.join(available.features)}")  # fmt: skip
    picked = list(dict.fromkeys(features)) or [next(iter(available.features))]
    if known is None:
        return dict.fromkeys(picked, TEMPLATE_SHARE)
    return {f: math.ceil(known.features[f].threshold * 1000) / 1000 for f in picked}


def missing_schemas(folder: Path) -> dict[Path, str]:
    """Return the JSON Schemas that the new files refer to, for editors, if they are missing."""
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
