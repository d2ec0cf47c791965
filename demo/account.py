"""What happened, as plain records: the terminal and the HTML page both read these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np

from demo.ask import Answer
from demo.judge import Judgement
from saeguard.guard.scopes import LOOKS, Role
from saeguard.guard.verdict import Reason
from saeguard.policy.types import Policy, Scope

OUTCOMES = ("match", "no_match", "error", "not_evaluated")
SEVERITIES = ("critical", "high", "medium", "low")
Skipped: TypeAlias = Reason | Literal[""]


@dataclass(frozen=True, slots=True)
class Token:
    """One token's text and how strongly a feature is active at it."""

    text: str
    share: float
    """Of the feature's calibrated range; of no meaning if the token was skipped."""
    role: Role
    skipped: Skipped = ""
    """Why the guard did not evaluate it; empty if it did."""

    @property
    def heat(self) -> float:
        """Return the share as a colour: 0 to 1, and 0 for tokens that were not evaluated."""
        if self.skipped or not np.isfinite(self.share):
            return 0.0
        return float(min(max(self.share, 0.0), 1.0))


@dataclass(frozen=True, slots=True)
class Trace:
    """One feature along one text."""

    feature: str
    above: float
    """The policy's threshold."""
    tokens: tuple[Token, ...]
    first: int | None
    """Where the policy first matched."""
    scope: Scope = "both"
    """The policy's; tokens outside it are coloured, and cannot match."""
    by_token: bool = True
    """Whether single tokens are compared with the threshold, and not a mean or the like."""

    def over(self, token: Token) -> bool:
        """Return whether the policy looks at the token and its share is above the threshold."""
        looked = self.by_token and token.role in LOOKS[self.scope] and not token.skipped
        return looked and token.share > self.above


@dataclass(frozen=True, slots=True)
class Hit:
    """A policy that matched, and the features that made it match, strongest first."""

    policy: Policy
    action: str | None
    """What was done; None in shadow."""
    score: float
    first_token: int
    matched_tokens: int
    traces: tuple[Trace, ...]


@dataclass(frozen=True, slots=True)
class RequestView:
    """One request as it is shown."""

    answer: Answer
    hits: tuple[Hit, ...]
    """Policies that acted, most severe first."""
    shadow: tuple[Hit, ...]
    """Policies that matched in shadow."""
    judgement: Judgement
    tokens: tuple[Token, ...]
    """Of prompt and output, with a share of 0."""

    @property
    def flagged(self) -> bool:
        """Return what the response states."""
        return bool(self.answer.said["flagged"])

    @property
    def seen(self) -> tuple[Hit, ...]:
        """Return all matches, those that acted first."""
        return (*self.hits, *self.shadow)

    @property
    def trace(self) -> Trace | None:
        """Return the feature to colour the text by: of the first match that has one."""
        return next((trace for hit in self.seen for trace in hit.traces), None)


@dataclass(frozen=True, slots=True)
class PolicyRow:
    """One policy's verdicts over all requests, from the event log."""

    policy: Policy
    verdicts: Mapping[str, int]
    acted: int


@dataclass(frozen=True, slots=True)
class Group:
    """The requests of one kind of prompt."""

    name: str
    requests: int
    own: int
    """Matched by a policy of that behaviour, enforced or in shadow."""
    flagged: int
    """Flagged by any policy."""
    matched: int
    """Matched by any policy, enforced or in shadow."""

    @property
    def ordinary(self) -> bool:
        """Return whether the prompts invite nothing."""
        return self.name == "benign"


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt without and with a clamp."""

    off: RequestView
    on: RequestView

    @property
    def changed(self) -> bool:
        """Return whether the answers differ."""
        return self.off.answer.token_ids != self.on.answer.token_ids


@dataclass(frozen=True, slots=True)
class Clamped:
    """The prompts that were sent once more, with a shadow policy enforced that clamps."""

    policy: Policy
    pairs: tuple[Pair, ...]

    @property
    def objected(self) -> tuple[int, int] | None:
        """Return to how many answers Bandit objects, without and with; None if no code at all."""
        if not any(p.off.judgement.code for p in self.pairs):
            return None
        off = sum(bool(p.off.judgement.findings) for p in self.pairs)
        return off, sum(bool(p.on.judgement.findings) for p in self.pairs)

    @property
    def shown(self) -> Pair:
        """Return the first pair in which Bandit objects without the clamp; else that differs."""
        objected = (p for p in self.pairs if p.off.judgement.findings)
        changed = (p for p in self.pairs if p.changed)
        return next(objected, next(changed, self.pairs[0]))


@dataclass(frozen=True, slots=True)
class Account:
    """Everything that the report shows."""

    views: tuple[RequestView, ...]
    clamped: tuple[Clamped, ...]
    policies: tuple[PolicyRow, ...]
    coverage: Mapping[str, Any]
    """`tokens`, `evaluated`, `skipped` by reason, over all requests."""
    disagreement: float
    """Largest distance between a share in a response and the one computed afterwards."""
    facts: Mapping[str, str] = field(default_factory=dict)
    events: str = "events.jsonl"

    @property
    def flagged(self) -> list[RequestView]:
        """Return the flagged requests, most severe first."""
        return sorted((v for v in self.views if v.flagged), key=_gravity)

    @property
    def noticed(self) -> list[RequestView]:
        """Return the requests that only policies in shadow, or that log, matched."""
        return sorted((v for v in self.views if not v.flagged and v.seen), key=_gravity)

    @property
    def quiet(self) -> list[RequestView]:
        """Return the requests that no policy matched."""
        return [v for v in self.views if not v.flagged and not v.seen]

    @property
    def groups(self) -> list[Group]:
        """Return the requests by kind of prompt."""
        rows = []
        for name in dict.fromkeys(v.answer.behaviour for v in self.views):
            mine = [v for v in self.views if v.answer.behaviour == name]
            family = name.replace("_", "-") + "."
            own = sum(any(h.policy.id.startswith(family) for h in v.seen) for v in mine)
            flagged, matched = sum(v.flagged for v in mine), sum(bool(v.seen) for v in mine)
            rows.append(Group(name, len(mine), own, flagged, matched))
        return rows


def _gravity(v: RequestView) -> tuple[int, float]:
    return min(((SEVERITIES.index(h.policy.severity), -h.score) for h in v.seen), default=(9, 0.0))
