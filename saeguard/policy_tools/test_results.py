"""The result of a test case: its verdict, compared with what was expected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from saeguard.policy.types import Policy
from saeguard.policy_tools.test_cases import Case, cases_path
from saeguard.yaml_files.findings import Finding

Status: TypeAlias = Literal["passed", "failed", "skipped", "todo", "passes"]
"""`todo`: it fails, as is known. `passes`: it is marked `todo`, but passes."""


class Judged(Protocol):
    """The parts of a verdict about which a case may state expectations."""

    @property
    def outcome(self) -> str:
        """The verdict: `match`, `no_match`, `error` or `not_evaluated`."""

    @property
    def score(self) -> float | None:
        """Highest score; above 1 is a match."""

    @property
    def first_token(self) -> int | None:
        """Position of the first match."""

    @property
    def matched_tokens(self) -> int:
        """Number of tokens on which the policy was on."""


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one case."""

    policy: Policy
    case: Case
    verdict: Judged | None
    """None if the case was not run."""
    status: Status
    complaint: str
    """What was found and expected, or why the case was not run."""

    def finding(self) -> Finding:
        """Return a finding for a failed case, or for a `todo` case that passes."""
        path = cases_path(self.policy.path)
        if self.status == "passes":
            message = f"{self.case.name}: the case passes now; remove todo: true"
            return Finding(path, self.case.line, 1, "test-passes", message, level="note")
        message = f"{self.case.name}: {self.complaint}"
        return Finding(path, self.case.line, 1, "test-failed", message)


def compare(policy: Policy, case: Case, verdict: Judged) -> Result:
    """Return the result of a case that was judged."""
    compared = [
        ("verdict", case.expect, verdict.outcome),
        ("first_token", case.first_token, verdict.first_token),
        ("matched_tokens", case.matched_tokens, verdict.matched_tokens),
    ]
    wrong = [
        f"{name}: found {got}, expected {expected}"
        for name, expected, got in compared
        if expected is not None and got != expected
    ]
    status: Status = "failed" if wrong else "passed"
    if case.todo:
        status = "todo" if wrong else "passes"
    return Result(policy, case, verdict, status, "; ".join(wrong))
