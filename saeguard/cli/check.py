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
    known, broken = read_feature_sets(feature_sets)
    referring = [policy for policy in policies if policy.feature_set not in broken]
    complaints = [complaint for of_one in broken.values() for complaint in of_one]
    findings = PolicyErrors([*errors, *complaints, *resolve(referring, known)]).errors
    wrong = sum(finding.level == "error" for finding in findings)
    if findings or format_ == "json":
        typer.echo(_rendered(findings, format_))
    if format_ == "text":
        counts = f"{_count(wrong, 'error')}, {_count(len(findings) - wrong, 'warning')}"
        typer.echo(f"{_count(len(policies), 'policy', 'policies')} read: {counts}", err=bool(wrong))
    if wrong or (strict and findings):
        raise typer.Exit(1)


def read_feature_sets(folder: Path) -> tuple[dict[str, Document], dict[str, list[PolicyError]]]:
    """Return the feature sets by name, and why the others cannot be used, by name.

    Only the files are read, so that policies can be checked where the checkpoints are not.
    """
    from saeguard.features.schema import FeatureSetError, read_document
    from saeguard.policy.errors import PolicyError, show

    known: dict[str, Document] = {}
    broken: dict[str, list[PolicyError]] = {}
    for path in sorted(folder.rglob("*.yaml")):
        name = path.relative_to(folder).with_suffix("").as_posix()
        try:
            document = read_document(path)
        except FeatureSetError as error:
            messages = str(error).replace(f"{path}: ", "").splitlines()
        else:
            known[name] = document
            if document.id == name:
                continue
            messages = [f"the id is {show(document.id)}; name it like its file, {show(name)}"]
        broken[name] = [PolicyError(path, 0, 0, "bad-feature-set", m) for m in messages]
    return known, broken


def _rendered(findings: Sequence[PolicyError], format_: Format) -> str:
    if format_ == "json":
        records = [asdict(f) | {"path": os.fspath(f.path)} for f in findings]
        return json.dumps(records, indent=2)
    lines = (_annotation(f) if format_ == "github" else f.render() for f in findings)
    return "\n".join(lines)


def _annotation(finding: PolicyError) -> str:
    """Return a GitHub workflow command, which shows at the line in a pull request."""
    place = {"file": finding.path, "line": finding.line, "col": finding.column}
    known = {key: value for key, value in place.items() if value} | {"title": finding.code}
    properties = ",".join(f"{key}={_escaped(str(value))}" for key, value in known.items())
    return f"::{finding.level} {properties}::{_escaped(finding.message, ends='')}"


def _escaped(text: str, ends: str = ":,") -> str:
    from saeguard.policy.errors import printable

    text = printable(text)
    for character in f"%{ends}":
        text = text.replace(character, f"%{ord(character):02X}")
    return text


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
