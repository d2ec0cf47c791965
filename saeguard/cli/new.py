"""`saeguard policy new`: a new policy file and its test file."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import typer

from saeguard.atomic_files import write_new
from saeguard.cli.feature_folder import read_feature_sets
from saeguard.cli.options import (
    FEATURE_SETS,
    FeatureSetsOption,
    OptionalModel,
    existing_file,
)
from saeguard.errors import InputError
from saeguard.features.reading import PEAK, Reading, read_words
from saeguard.policy.types import Scope

if TYPE_CHECKING:
    from collections.abc import Iterable

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
        typer.Option(help="Feature to watch. Repeatable, with --combine."),
    ] = None,
    combine: Annotated[
        Literal["token", "request", "any"] | None,
        typer.Option(
            help="With several features: token, all at one and the same token; request, each "
            "somewhere in the request; any, one is enough."
        ),
    ] = None,
    corpus: Annotated[
        Path | None,
        typer.Option(
            help="Texts that should match, as a recording or, with --model, as a file of texts: "
            "how many match is printed, for each way to combine the features.",
            callback=existing_file,
        ),
    ] = None,
    model: OptionalModel = None,
    folder: Annotated[Path, typer.Option(help="Folder of policies.")] = Path("policies"),
    feature_sets: FeatureSetsOption = FEATURE_SETS,
) -> None:
    """Write a new policy and its tests, with marks for what its owner has to fill in.

    Thresholds, scope and window are those of the calibration. The policy is in shadow mode, its
    tests pass, and `saeguard check` lists what is still to do.
    Existing files are never overwritten. Exit codes: 0 written, 2 the command is wrong, 3 the files
    cannot be written.
    """
    from saeguard.cli.combine import check_combined, matching, which_is_meant
    from saeguard.policy.schema import POLICY_ID
    from saeguard.policy_tools.scaffold import Draft, draft
    from saeguard.yaml_files.section import FORMS

    today = datetime.now(UTC).date()

    if not re.fullmatch(POLICY_ID, id_):
        raise InputError(f"{id_!r} is not a policy id; write {FORMS[POLICY_ID]}")
    sets = read_feature_sets(feature_sets)
    thresholds = chosen(sets, set_, feature or [])
    scope, reading = calibrated_for(sets, set_, thresholds)
    wanted = Draft(id_, set_, thresholds, scope, reading)
    counts = {} if corpus is None else matching(wanted, sets, corpus, model, feature_sets)
    if len(thresholds) > 1 and combine is None:
        raise InputError(which_is_meant(list(thresholds), counts))
    wanted = replace(wanted, combine=combine or "token")
    check_combined(wanted)
    path = folder.joinpath(*id_.split(".")).with_suffix(".yaml")
    tests = path.with_suffix(".test.yaml")
    there = [str(file) for file in (path, tests) if os.path.lexists(file)]
    if there:
        raise InputError(
            f"{' and '.join(there)}: exists already; choose another id, or edit that file"
        )
    schema = os.path.relpath(folder, path.parent)
    texts = draft(wanted, f"{Path(schema).as_posix()}/", today)
    write_new(dict(zip((path, tests), texts, strict=True)) | missing_schemas(folder))
    typer.echo(f"Wrote {path} and {tests.name}. `saeguard check {path}` lists what is still to do.")
    if counts:
        typer.echo(f"It matches {counts[wanted.combine]} in {corpus}.")


def chosen(sets: FeatureSets, name: str, features: list[str]) -> dict[str, float]:
    """Return the features to watch, each with its calibrated threshold or `TEMPLATE_SHARE`."""
    from saeguard.features.files import FeatureSetError
    from saeguard.yaml_files.findings import did_you_mean

    if name in sets.broken:
        raise FeatureSetError(sets.broken[name])
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
    picked = list(dict.fromkeys(features))
    if not picked and len(available.features) > 1:
        raise InputError(f"--feature: expected a feature to watch, found none; {name} has: "
             f"{', '.join(available.features)}")  # fmt: skip
    picked = picked or list(available.features)
    if known is None:
        return dict.fromkeys(picked, TEMPLATE_SHARE)
    return {f: rounded_up(known.features[f].threshold) for f in picked}


def rounded_up(threshold: float) -> float:
    """Return a threshold with three decimals, at which no more texts match."""
    return math.ceil(threshold * 1000) / 1000


def calibrated_for(sets: FeatureSets, name: str, features: Iterable[str]) -> tuple[Scope, Reading]:
    """Return the scope and the reading that features were calibrated for.

    Raises:
        InputError: they differ, so that one policy cannot keep the calibrated rates.
    """
    known = sets.known.get(name)
    if known is None:
        return "output", PEAK
    found: dict[tuple[Scope, Reading], str] = {}
    for feature in features:
        evidence = known.features[feature].evidence
        scope, window = evidence.get("scope", "output"), str(evidence.get("window", "1 of 1"))
        reading = _reading(window)
        if scope not in get_args(Scope) or reading is None:
            raise InputError(
                f"{name}: features.{feature}.evidence: found scope {scope!r} and window "
                f"{window!r}; run `saeguard features calibrate`, which writes both"
            )
        found.setdefault((scope, reading), feature)
    if len(found) > 1:
        listed = "; ".join(f"{f}: {s}, {reading.words}" for (s, reading), f in found.items())
        raise InputError(
            f"the features were calibrated for different scopes or windows ({listed}); write a "
            "policy for each"
        )
    return next(iter(found))


def _reading(words: str) -> Reading | None:
    """Return the reading that evidence spells, None if people made it into something else."""
    try:
        return read_words(words)
    except ValueError:
        return None


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
