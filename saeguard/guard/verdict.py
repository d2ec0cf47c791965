"""What the guard concludes of a request, and of how much of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from saeguard.policy.types import Action, Mode, Severity

Outcome: TypeAlias = Literal["match", "no_match", "error", "not_evaluated"]
"""Never folded into one another. `no_match` speaks of the tokens that coverage counts."""

Reason: TypeAlias = Literal[
    "not_forwarded",
    "prefix_cached",
    "special_token",
    "not_sampled",
    "aborted",
    "error",
    "untracked",
]
"""Why a token was not evaluated; a closed list."""

THRESHOLD = 1.0
"""Scores are evidence over threshold, so a policy matches where its score exceeds 1."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """Tokens evaluated, of tokens in the policy's scope; the ledger of one verdict.

    `evaluated + sum(skipped.values()) == tokens` holds for every verdict.
    """

    tokens: int
    evaluated: int
    skipped: Mapping[Reason, int]


@dataclass(frozen=True, slots=True)
class Fired:
    """One feature's activity within a request, in shares of its calibrated range."""

    count: int
    """Tokens above the policy's threshold."""
    max: float
    at: int
    """Position of the maximum, counted from the first prompt token."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one policy concluded of one request."""

    policy: str
    digest: str
    mode: Mode
    action: Action
    severity: Severity
    outcome: Outcome
    score: float | None
    """Evidence over threshold, see `saeguard.guard.judge`; None where nothing was evaluated."""
    first_token: int | None
    """Position of the first match, counted from the first prompt token."""
    matched_tokens: int
    acted: Action | None
    """What was done; None in shadow, without a match, or under an exception."""
    features: Mapping[str, Fired]
    coverage: Coverage
    exception: str | None = None
    """Id of the exception that waived the action."""
    error: str | None = None
    approximate: bool = False
    """Whether thresholds stood for the ranks of a TopK SAE's latents: a latent may have been taken
    to fire that does not, and the other way round, as often as the feature set says."""
    message: str | None = None
    """What the client reads in place of the text, where the policy stopped the request."""


def balanced(coverage: Coverage) -> bool:
    """Return whether every token is accounted for."""
    return coverage.evaluated + sum(coverage.skipped.values()) == coverage.tokens
