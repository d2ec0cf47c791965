"""`saeguard check`: say everything that is wrong with the policies, and where."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from saeguard.features.schema import Document
    from saeguard.policy.errors import PolicyError

Format = Literal["text", "json", "github"]


def verb(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Policy files or folders. Default: policies.")
    ] = None,
    feature_sets: Annotated[
        Path,
        typer.Option(help="Folder of feature sets.", exists=True, file_okay=False),
    ] = Path("feature_sets"),
    format_: Annotated[
        Format, typer.Option("--format", help="text, json, or github for annotations in CI.")
    ] = "text",
    strict: Annotated[bool, typer.Option("--strict", help="Fail on warnings too.")] = False,
) -> None:
    """Check policies: syntax, sense, and the features they name.

    Exits with 0 where all is well, 1 where a policy is wrong, 2 where the command was.
    """
    from saeguard.policy.errors import PolicyErrors
    from saeguard.policy.lint import resolve
    from saeguard.policy.load import read_policies

    policies, errors = read_policies(*(paths or [Path("policies")]))
    known, broken, complaints = read_feature_sets(feature_sets)
    referring = [policy for policy in policies if policy.feature_set not in broken]
    findings = PolicyErrors([*errors, *complaints, *resolve(referring, known)]).errors
    wrong = sum(finding.level == "error" for finding in findings)
    typer.echo(_rendered(findings, format_), nl=bool(findings))
    if format_ == "text":
        counts = f"{_count(wrong, 'error')}, {_count(len(findings) - wrong, 'warning')}"
        typer.echo(f"{_count(len(policies), 'policy', 'policies')} read: {counts}", err=bool(wrong))
    if wrong or (strict and findings):
        raise typer.Exit(1)


def read_feature_sets(
    folder: Path,
) -> tuple[dict[str, Document], set[str], list[PolicyError]]:
    """Return the feature sets by name, the names of those that are broken, and why they are.

    Only the files are read, so that policies can be checked where the checkpoints are not.
    """
    from saeguard.features.schema import FeatureSetError, read_document
    from saeguard.policy.errors import PolicyError, show

    known: dict[str, Document] = {}
    complaints: list[PolicyError] = []
    for path in sorted(folder.rglob("*.yaml")):
        name = path.relative_to(folder).with_suffix("").as_posix()
        try:
            known[name] = read_document(path)
            message = f"the id is {show(known[name].id)}; name it like its file, {show(name)}"
            wrong = known[name].id != name
        except FeatureSetError as error:
            message, wrong = str(error).removeprefix(f"{path}: "), True
        if wrong:
            complaints.append(PolicyError(path, 0, 0, "bad-feature-set", message))
    broken = {c.path.relative_to(folder).with_suffix("").as_posix() for c in complaints}
    return known, broken, complaints


def _rendered(findings: Sequence[PolicyError], format_: Format) -> str:
    if format_ == "json":
        records = [asdict(f) | {"path": os.fspath(f.path)} for f in findings]
        return json.dumps(records, indent=2)
    render = _annotation if format_ == "github" else type(findings[0]).render if findings else str
    return "\n".join(map(render, findings))


def _annotation(finding: PolicyError) -> str:
    """Return a GitHub workflow command, which shows at the line in a pull request."""
    place = {"file": os.fspath(finding.path), "line": finding.line, "col": finding.column}
    place = {key: value for key, value in place.items() if value} | {"title": finding.code}
    properties = ",".join(f"{key}={_escaped(str(value))}" for key, value in place.items())
    return f"::{finding.level} {properties}::{_escaped(finding.message, ends='')}"


def _escaped(text: str, ends: str = ":,") -> str:
    for character in f"%\r\n{ends}":
        text = text.replace(character, f"%{ord(character):02X}")
    return text


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
