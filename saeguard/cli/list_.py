"""`saeguard policy list`: which policies there are."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saeguard.cli.feature_folder import FeatureSets, read_feature_sets
from saeguard.cli.inputs import read_all
from saeguard.cli.options import FEATURE_SETS, FeatureSetsOption
from saeguard.cli.report import columns

if TYPE_CHECKING:
    from saeguard.policy.types import Policy

INDEX = """\
<!-- Written by `saeguard policy list --markdown > policies/README.md`; a test compares. -->
# Policies

The path is the taxonomy: behaviour, then what it looks like. Each policy has its tests beside it.
A policy whose features are a *template* says what to look for; its features have to be found and
calibrated in your own model before it is served or can be enforced
([how](../docs/policy-tools.md#templates)).
"""


def verb(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Policy files or folders. Default: policies.")
    ] = None,
    feature_sets: FeatureSetsOption = FEATURE_SETS,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
    markdown: Annotated[
        bool,
        typer.Option("--markdown", help="Print a Markdown page, grouped by behaviour, with links."),
    ] = False,
) -> None:
    """List policies with their mode, action, severity, owner and feature set.

    Exit codes: 0, 2 a file or the command is wrong.
    """
    places = paths or [Path("policies")]
    policies = sorted(read_all(places), key=lambda p: (p.id, p.mode))
    sets = read_feature_sets(feature_sets)
    if as_json:
        typer.echo(json.dumps([record(p, sets) for p in policies], indent=2))
    elif markdown:
        typer.echo("\n".join(index(policies, sets, places[0])))
    else:
        typer.echo("\n".join(table(policies, sets)))


def record(policy: Policy, sets: FeatureSets) -> dict[str, Any]:
    """Return one policy as a record for JSON."""
    return {
        "id": policy.id,
        "mode": policy.mode,
        "action": policy.action,
        "severity": policy.severity,
        "owner": policy.owner,
        "review_by": policy.review_by.isoformat() if policy.review_by else None,
        "feature_set": policy.feature_set,
        "calibrated": policy.feature_set not in sets.templates,
        "title": policy.title,
        "path": os.fspath(policy.path),
        "digest": policy.digest,
    }


def table(policies: Sequence[Policy], sets: FeatureSets) -> list[str]:
    """Return the policies as a table for a terminal."""
    heads = ("id", "mode", "action", "severity", "owner", "review by", "feature set")
    rows = [
        (r["id"], r["mode"], r["action"], r["severity"], r["owner"], r["review_by"] or "-",
         r["feature_set"] + ("" if r["calibrated"] else " (template)"))
        for r in (record(policy, sets) for policy in policies)
    ]  # fmt: skip
    return columns([heads, *rows])


def index(policies: Sequence[Policy], sets: FeatureSets, folder: Path) -> Iterator[str]:
    """Yield the policies as a Markdown page that lies in `folder`."""
    yield INDEX.rstrip()
    for behaviour, group in groupby(policies, key=lambda policy: policy.id.split(".")[0]):
        yield ""
        yield f"## {behaviour.replace('-', ' ')}"
        yield ""
        yield "| policy | watches for | mode | action | severity | features |"
        yield "|---|---|---|---|---|---|"
        for policy in group:
            r = record(policy, sets)
            link = Path(os.path.relpath(policy.path, folder)).as_posix()
            features = f"`{r['feature_set']}`" if r["calibrated"] else "template"
            title = r["title"].replace("|", "\\|")
            cells = (f"[{r['id']}]({link})", title, r["mode"], r["action"], r["severity"], features)
            yield f"| {' | '.join(cells)} |"
