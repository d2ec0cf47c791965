"""Verdicts, and the coverage of each: how many tokens were evaluated or skipped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from saeguard.policy.types import Action, Mode, Severity

Outcome: TypeAlias = Literal["match", "no_match", "error", "not_evaluated"]
"""The four verdicts. `no_match` holds only for the tokens that the coverage counts as evaluated."""

Reason: TypeAlias = Literal[
    "not_forwarded",
    "prefix_cached",
    "special_token",
    "massive_norm",
    "not_sampled",
    "aborted",
    "error",
    "untracked",
]
"""The reasons why a token was not evaluated; a closed list."""

THRESHOLD = 1.0
"""A policy matches if its score exceeds this, since evidence is a share over its threshold."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """Tokens in the policy's scope, and how many of them were evaluated or skipped.

    `evaluated + sum(skipped.values()) == tokens` holds for every verdict.
    """

    tokens: int
    evaluated: int
    skipped: Mapping[Reason, int]


@dataclass(frozen=True, slots=True)
class Fired:
    """One feature's activity within a request, in shares."""

    count: int
    """Tokens above the selection's threshold."""
    max: float
    """Highest share."""
    at: int
    """Position of the maximum, counted from the first prompt token."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One policy's result on one request."""

    policy: str
    digest: str
    mode: Mode
    action: Action
    severity: Severity
    outcome: Outcome
    score: float | None
    """Highest score, see `saeguard.guard.judge`; None if no token was evaluated."""
    first_token: int | None
    """Position of the first match, counted from the first prompt token."""
    matched_tokens: int
    acted: Action | None
    """The action that was taken; None in shadow, without a match, or under an exception."""
    features: Mapping[str, Fired]
    coverage: Coverage
    exception: str | None = None
    """Id of the exception that waived the action."""
    error: str | None = None
    approximate: bool = False
    """Whether fixed thresholds replaced the ranks of a TopK SAE's latents. Such a latent may fire
    on other tokens than by rank; the feature set states how often."""
    message: str | None = None
    """The text that replaces the output if the policy stopped the request."""


def balanced(coverage: Coverage) -> bool:
    """Return whether evaluated and skipped tokens add up to all tokens."""
    return coverage.evaluated + sum(coverage.skipped.values()) == coverage.tokens
