"""`saeguard check`: say everything that is wrong with the policies, and where."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saeguard.cli.failures import BAD_INPUT, FINDINGS, stop
from saeguard.cli.feature_folder import FEATURE_SETS, FeatureSetsOption, read_feature_sets
from saeguard.cli.report import Format, count, rendered

if TYPE_CHECKING:
    from saeguard.cli.feature_folder import FeatureSets
    from saeguard.policy.errors import PolicyError
    from saeguard.policy.types import Policy


def verb(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Policy files or folders. Default: policies.")
    ] = None,
    feature_sets: FeatureSetsOption = FEATURE_SETS,
    model: Annotated[
        Path | None,
        typer.Option(help="Folder of a model: refuse feature sets that are made for another."),
    ] = None,
    format_: Annotated[
        Format,
        typer.Option(
            "--format", help="text, json, sarif for code scanning, or github for annotations in CI."
        ),
    ] = "text",
    strict: Annotated[bool, typer.Option("--strict", help="Fail on warnings too.")] = False,
    notes: Annotated[
        bool, typer.Option("--notes", help="Show notes as well: what is open, but not wrong.")
    ] = False,
    require_tests: Annotated[
        bool, typer.Option("--require-tests", help="Fail where a policy has no test file.")
    ] = False,
) -> None:
    """Check policies: syntax, sense, and the features they name.

    Exits with 0 where all is well, 1 where a policy is wrong, 2 where the command was.
    """
    from saeguard.policy.errors import PolicyErrors
    from saeguard.policy.lint import of_feature_set, resolve
    from saeguard.policy.load import read_policies
    from saeguard.policy_tools.test_cases import cases_path, missing_tests

    policies, errors = read_policies(*(paths or [Path("policies")]))
    sets = read_feature_sets(feature_sets)
    referring = [policy for policy in policies if policy.feature_set not in sets.broken]
    found = [*errors, *sets.mistakes, *resolve(referring, sets.known, templates=sets.templates)]
    for policy in referring:
        if policy.feature_set in sets.known:
            found += of_feature_set(policy, sets.known[policy.feature_set])
    if model is not None:
        found += of_other_model(referring, sets, model)
    if require_tests:
        found += [missing_tests(p) for p in policies if not cases_path(p.path).exists()]
    findings = PolicyErrors(found).errors
    wrong, warned = (sum(f.level == level for f in findings) for level in ("error", "warning"))
    quiet = format_ == "text" and not notes
    text = rendered([f for f in findings if f.level != "note" or not quiet], format_)
    if text:
        typer.echo(text)
    if format_ == "text":
        counts = f"{count(wrong, 'error')}, {count(warned, 'warning')}"
        noted = len(findings) - wrong - warned
        counts += f", {count(noted, 'note')}" if noted else ""
        counts += " (--notes shows them)" if noted and not notes else ""
        typer.echo(f"{count(len(policies), 'policy', 'policies')} read: {counts}", err=bool(wrong))
    if wrong or (strict and warned):
        raise typer.Exit(FINDINGS)


def of_other_model(
    policies: Sequence[Policy], sets: FeatureSets, folder: Path
) -> Iterator[PolicyError]:
    """Yield the policies whose feature set is made for a model of another shape."""
    from saeguard.features.model_fit import ModelFitError, misfit, read_shape
    from saeguard.policy.load import locate

    try:
        shape = read_shape(folder)
    except ModelFitError as error:
        stop(f"--model: {error}", BAD_INPUT)
    for policy in policies:
        document = sets.known.get(policy.feature_set)
        difference = document and misfit(document.model, shape)
        if difference:
            message = f"the feature set is {difference}; name one that is made for this model"
            yield locate(policy).error("other-model", message, ("feature_set",))
