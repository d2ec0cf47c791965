"""`saeguard check`: every mistake in policy files, with file, line and column."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saeguard.cli.feature_folder import read_feature_sets
from saeguard.cli.options import FEATURE_SETS, FeatureSetsOption, existing_file
from saeguard.cli.report import Format, count, rendered
from saeguard.errors import BAD_INPUT, FINDINGS, InputError

if TYPE_CHECKING:
    from saeguard.cli.feature_folder import FeatureSets
    from saeguard.policy.types import Policy
    from saeguard.yaml_files.findings import Finding


def verb(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Policy files or folders. Default: policies.")
    ] = None,
    feature_sets: FeatureSetsOption = FEATURE_SETS,
    model: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a Hugging Face model, or its name on the hub; feature sets made for "
            "another are mistakes."
        ),
    ] = None,
    format_: Annotated[
        Format,
        typer.Option(
            "--format",
            help="text; json for programs; sarif for code scanning; github for annotations.",
        ),
    ] = "text",
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 on warnings as well.")
    ] = False,
    notes: Annotated[
        bool, typer.Option("--notes", help="Show notes as well: what is still open, but not wrong.")
    ] = False,
    require_tests: Annotated[
        bool, typer.Option("--require-tests", help="Exit with 1 if a policy has no test file.")
    ] = False,
    corpus: Annotated[
        Path | None,
        typer.Option(
            help="Recording of texts, or texts with --model: a policy that none of them matches is "
            "a warning.",
            callback=existing_file,
        ),
    ] = None,
) -> None:
    """Check policies: their syntax, whether they can match, and the features they name.

    Exit codes: 0 no mistake, 1 a policy is wrong, 2 the command is wrong or a path does not exist.
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
    used = {policy.feature_set for policy in referring} & sets.known.keys()
    found += unpinned_sets(used, feature_sets)
    if model is not None:
        found += of_other_model(referring, sets, model)
    if require_tests:
        found += [missing_tests(p) for p in policies if not cases_path(p.path).exists()]
    if corpus is not None:
        found += unmatched(referring, sets, corpus, model, feature_sets)
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
    if any(finding.code == "not-found" for finding in errors):
        raise typer.Exit(BAD_INPUT)
    if wrong or (strict and warned):
        raise typer.Exit(FINDINGS)


def unpinned_sets(names: Iterable[str], folder: Path) -> Iterator[Finding]:
    """Yield a warning for each digest that a feature set in use does not pin."""
    from saeguard.features.files import read_with_positions
    from saeguard.features.unpinned import unpinned

    for name in sorted(names):
        yield from unpinned(*read_with_positions(folder / f"{name}.yaml"))


def of_other_model(
    policies: Sequence[Policy], sets: FeatureSets, folder: Path
) -> Iterator[Finding]:
    """Yield a mistake for each policy whose feature set is made for a model of another shape."""
    from saeguard.features.model_fit import ModelFitError, misfit, read_shape
    from saeguard.hf.model_folder import model_folder
    from saeguard.policy.load import locate

    try:
        shape = read_shape(model_folder(folder, files=("config.json",)))
    except ModelFitError as error:
        raise InputError(f"--model: {error}") from error
    for policy in policies:
        document = sets.known.get(policy.feature_set)
        difference = document and misfit(document.model, shape)
        if difference:
            message = f"the feature set is {difference}; name one that is made for this model"
            yield locate(policy).error("other-model", message, ("feature_set",))


def unmatched(
    policies: Sequence[Policy],
    sets: FeatureSets,
    corpus: Path,
    model: Path | None,
    feature_sets: Path,
) -> Iterator[Finding]:
    """Yield a warning for each policy that matches no text of a corpus.

    Policies that cannot be judged have findings of their own, or are templates.
    """
    from saeguard.cli.inputs import open_corpus
    from saeguard.policy.lint import resolve
    from saeguard.policy.load import locate
    from saeguard.policy_tools.explanation import explain_all
    from saeguard.policy_tools.nearest import never_matched

    wrong = {f.path for f in resolve(policies, sets.known, templates=sets.templates)
             if f.level == "error"}  # fmt: skip
    ready = [p for p in policies if p.feature_set in sets.known and p.path not in wrong]
    if not ready:
        return
    recording = open_corpus(corpus, ready, model, feature_sets)
    for policy in ready:
        texts = range(len(recording.ids))
        never = never_matched(explain_all(policy, sets.known, recording, texts))
        if never is not None:
            message = f"{corpus.name}: {never.in_words(policy, recording.ids[never.text])}"
            finding = locate(policy).error("never-matched", message, ("condition",))
            yield replace(finding, level="warning")
