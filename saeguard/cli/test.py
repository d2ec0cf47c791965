"""`saeguard test`: run the tests that lie beside the policies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import numpy as np

    from saeguard.guard.verdict import Verdict
    from saeguard.policy.cases import Case
    from saeguard.policy.errors import PolicyError
    from saeguard.policy.types import Policy

    Judge = Callable[[Policy, Mapping[str, np.ndarray], int], Verdict]


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one case."""

    policy: Policy
    case: Case
    verdict: Verdict
    complaint: str
    """What was expected and what came instead; empty where the case passed."""


def verb(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Policy files or folders. Default: policies.")
    ] = None,
    require_tests: Annotated[
        bool, typer.Option("--require-tests", help="Fail where a policy has no tests.")
    ] = False,
) -> None:
    """Test policies: run each NAME.test.yaml on traces, without model or accelerator.

    Exits with 0 where every case passed, 1 where one did not or a file is wrong.
    """
    from saeguard.guard.rules import judge
    from saeguard.policy.cases import policy_path
    from saeguard.policy.errors import PolicyErrors
    from saeguard.policy.files import is_test
    from saeguard.policy.load import read_policies

    places = [policy_path(p) if is_test(p) else p for p in paths or [Path("policies")]]
    policies, errors = read_policies(*places)
    cases, found = gather(places, policies, require_tests=require_tests)
    if errors or found:
        typer.echo(PolicyErrors([*errors, *found]), err=True)
        raise typer.Exit(1)
    results = [run(policy, case, judge) for policy, case in cases]
    _print(results)
    if any(result.complaint for result in results):
        raise typer.Exit(1)


def gather(
    places: Sequence[Path], policies: Sequence[Policy], *, require_tests: bool
) -> tuple[list[tuple[Policy, Case]], list[PolicyError]]:
    """Return every case with its policy, and what is wrong with the test files."""
    from saeguard.policy.cases import cases_path, policy_path, read_cases
    from saeguard.policy.errors import PolicyError
    from saeguard.policy.files import find_files, is_test

    cases: list[tuple[Policy, Case]] = []
    errors: list[PolicyError] = []
    for policy in policies:
        path = cases_path(policy.path)
        if path.exists():
            read, found = read_cases(path, policy)
            cases += [(policy, case) for case in read]
            errors += found
        elif require_tests:
            message = f"there are no tests for this policy; write {path.name} beside it"
            errors.append(PolicyError(policy.path, 0, 0, "test-missing", message))
    for path in {file for place in places for file in find_files(place)[0] if is_test(file)}:
        if not policy_path(path).exists():
            message = f"there is no {policy_path(path).name} beside this file; rename or remove it"
            errors.append(PolicyError(path, 0, 0, "test-orphan", message))
    return cases, errors


def run(policy: Policy, case: Case, judge: Judge) -> Result:
    """Judge one case and compare the verdict with what it expects."""
    import numpy as np

    shares = {feature: np.asarray(trace) for feature, trace in case.shares.items()}
    verdict = judge(policy, shares, case.prompt_tokens)
    compared = [
        ("verdict", case.expect, verdict.outcome),
        ("first_token", case.first_token, verdict.first_token),
        ("matched_tokens", case.matched_tokens, verdict.matched_tokens),
    ]
    wrong = [
        f"{name} {got}, not {expected}"
        for name, expected, got in compared
        if expected is not None and got != expected
    ]
    return Result(policy, case, verdict, "; ".join(wrong))


def _print(results: Sequence[Result]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from saeguard.policy.cases import cases_path

    table = Table("policy", "case", "verdict", "score", "", box=None, pad_edge=False)
    table.columns[0].no_wrap = True
    above = None
    for result in results:
        policy, score = result.policy, result.verdict.score
        table.add_row(
            Text("" if policy is above else f"{policy.id} {policy.mode}"),
            Text(result.case.name),
            Text(result.verdict.outcome),
            Text("-" if score is None else f"{score:.2f}"),
            Text("FAIL", "red") if result.complaint else Text("pass", "green"),
        )
        above = policy
    console = Console()
    console.print(table)
    failed = [result for result in results if result.complaint]
    for result in failed:
        place = f"{cases_path(result.policy.path)}:{result.case.line}"
        console.print(Text(f"{place}: {result.case.name}: {result.complaint}"), soft_wrap=True)
    console.print(Text(f"{len(results) - len(failed)} passed, {len(failed)} failed"))
