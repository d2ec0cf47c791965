"""`saeguard test`: run the tests that lie beside the policies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saeguard.atomic_files import write_atomically
from saeguard.cli.feature_folder import read_feature_sets
from saeguard.cli.options import (
    FEATURE_SETS,
    DeviceOption,
    DtypeOption,
    FeatureSetsOption,
    ModelOptions,
    OptionalModel,
    existing_file,
)
from saeguard.cli.report import Format, rendered
from saeguard.errors import FINDINGS

if TYPE_CHECKING:
    from saeguard.cli.false_alarms import Alarm
    from saeguard.policy.types import Policy
    from saeguard.policy_tools.test_cases import Case
    from saeguard.policy_tools.test_results import Result
    from saeguard.yaml_files.findings import Finding


def verb(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Policy files or folders. Default: policies.")
    ] = None,
    require_tests: Annotated[
        bool, typer.Option("--require-tests", help="Exit with 1 if a policy has no test file.")
    ] = False,
    feature_sets: FeatureSetsOption = FEATURE_SETS,
    model: OptionalModel = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    benign: Annotated[
        Path | None,
        typer.Option(
            help="Ordinary texts that should not match: JSON lines, or a recording.",
            callback=existing_file,
        ),
    ] = None,
    budget: Annotated[
        float,
        typer.Option(help="Share of the --benign texts that a policy may match.", min=0, max=1),
    ] = 0.01,
    format_: Annotated[
        Format, typer.Option("--format", help="text; or json, sarif, github: the failures only.")
    ] = "text",
    junit: Annotated[
        Path | None, typer.Option(help="Write the results to this file as JUnit XML as well.")
    ] = None,
) -> None:
    """Test policies: run the NAME.test.yaml beside each, on traces, recordings and texts.

    Texts need --model and are skipped without it. Exit codes: 0 every case passed, 1 one did not,
    2 a file or the command is wrong, 3 something is missing.
    """
    from saeguard.cli import false_alarms as ordinary
    from saeguard.cli.junit import junit_xml
    from saeguard.cli.run_tests import run_cases
    from saeguard.policy.errors import PolicyErrors
    from saeguard.policy.files import is_test
    from saeguard.policy.load import read_policies
    from saeguard.policy_tools.test_cases import policy_path

    places = [policy_path(p) if is_test(p) else p for p in paths or [Path("policies")]]
    policies, errors = read_policies(*places)
    cases, found, absent = gather(places, policies, require_tests=require_tests)
    if errors or found:
        raise PolicyErrors([*errors, *found, *absent])
    absent_default = feature_sets == FEATURE_SETS and not feature_sets.is_dir()
    sets = None if absent_default else read_feature_sets(feature_sets)  # traces need none
    options = ModelOptions(dtype, device)
    results = run_cases(cases, sets, model, feature_sets, options)
    alarms: list[Alarm] = []
    if benign is not None:
        sets = sets or read_feature_sets(feature_sets)
        alarms = ordinary.alarms(policies, sets, benign, model, feature_sets, options)
    failed = [*absent, *(r.finding() for r in results if r.status in {"failed", "passes"})]
    failed += [alarm.finding(budget) for alarm in alarms if alarm.rate > budget]
    if junit is not None:
        write_atomically(junit, junit_xml(results))
    if format_ == "text":
        _print(results, alarms, budget)
    text = rendered(PolicyErrors(failed).errors, format_)
    if text:
        typer.echo(text)
    if format_ == "text":
        typer.echo(_counted(results))
    if any(finding.level == "error" for finding in failed):
        raise typer.Exit(FINDINGS)


def gather(
    places: Sequence[Path], policies: Sequence[Policy], *, require_tests: bool
) -> tuple[list[tuple[Policy, Case]], list[Finding], list[Finding]]:
    """Return every case with its policy, the mistakes in test files, and the missing files."""
    from saeguard.policy.files import find_files, is_test
    from saeguard.policy_tools.test_cases import cases_path, missing_tests, policy_path, read_cases
    from saeguard.yaml_files.findings import Finding

    cases: list[tuple[Policy, Case]] = []
    errors: list[Finding] = []
    absent: list[Finding] = []
    for policy in policies:
        path = cases_path(policy.path)
        if path.exists():
            read, found = read_cases(path, policy)
            cases += [(policy, case) for case in read]
            errors += found
        elif require_tests:
            absent.append(missing_tests(policy))
    for path in {file for place in places for file in find_files(place)[0] if is_test(file)}:
        if not policy_path(path).exists():
            message = f"there is no {policy_path(path).name} beside this file; rename or remove it"
            absent.append(Finding(path, 0, 0, "test-orphan", message))
    return cases, errors, absent


def _counted(results: Sequence[Result]) -> str:
    """Return one line with the number of cases of each status."""
    words = {"skipped": "skipped (give --model)", "todo": "to do", "passes": "to do, but passing"}
    count = {s: sum(r.status == s for r in results) for s in ("passed", "failed", *words)}
    line = f"{count['passed']} passed, {count['failed']} failed"
    return line + "".join(f", {count[s]} {word}" for s, word in words.items() if count[s])


def _print(results: Sequence[Result], alarms: Sequence[Alarm], budget: float) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = {
        "passed": ("pass", "green"),
        "failed": ("FAIL", "red"),
        "skipped": ("skip", "yellow"),
        "todo": ("todo", "yellow"),
        "passes": ("pass", "yellow"),
    }
    table = Table("policy", "case", "verdict", "score", "", box=None, pad_edge=False)
    table.columns[0].no_wrap = True
    above = None
    for result in results:
        policy, verdict = result.policy, result.verdict
        score = verdict.score if verdict else None
        table.add_row(
            Text("" if policy is above else f"{policy.id} {policy.mode}"),
            Text(result.case.name),
            Text(verdict.outcome if verdict else "-"),
            Text("-" if score is None else f"{score:.2f}"),
            Text(*shown[result.status]),
        )
        above = policy
    console = Console()
    console.print(table)
    if alarms:
        rates = Table("on ordinary texts", "match", "rate", "95 %", "", box=None, pad_edge=False)
        for alarm in alarms:
            low, high = alarm.interval
            rates.add_row(
                Text(f"{alarm.policy.id} {alarm.policy.mode}"),
                f"{len(alarm.texts)} of {alarm.trials}",
                f"{alarm.rate:.2%}",
                f"{low:.2%} to {high:.2%}",
                Text("FAIL", "red") if alarm.rate > budget else Text("pass", "green"),
            )
        console.print()
        console.print(rates)
