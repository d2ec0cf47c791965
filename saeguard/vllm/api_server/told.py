"""What one client request is told: the verdicts of its choices, whatever route it came by.

A client request (an HTTP request, a line of a batch file) makes one or more requests of the engine.
Its `Told` is opened before its handler runs and is found again through a context variable. Whoever
builds the answer adds the `saeguard` object from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from saeguard.policy.types import strongest_action
from saeguard.vllm.api_server.withheld import Stopped
from saeguard.vllm.messages import MESSAGE

FLAGGED = "x-saeguard-flagged"
POLICIES = "x-saeguard-policies"
"""Headers of bodies that are not streamed; gateways drop body fields that they do not know."""

COUNTED = ("completion_tokens", "output_tokens", "total_tokens")
"""Counts of generated tokens in the usage of a body, by the names of OpenAI and Anthropic."""


@dataclass(slots=True, eq=False)
class Told:
    """The verdicts of one client request, by choice, as its choices finish."""

    verdicts: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    stops: dict[int, Stopped] = field(default_factory=dict)
    """By choice: the text of an answer that a policy stopped."""
    reasons: dict[int, str] = field(default_factory=dict)
    """By choice: its stop reason, of those that a policy stopped."""
    choices: int = 0
    """Choices of the engine's requests that it has made so far."""
    flags: list[Mapping[str, Any]] = field(default_factory=list)
    """The `saeguard` objects of policies that act while a stream is under way, not sent yet."""
    holds_tool_calls: bool = False
    """Whether a stream sends tool calls only once its answer has ended."""
    one_answer: bool = False
    """Whether the engine's requests are the steps of one answer, as those of beam search are."""
    embedded: bool = False
    """Whether the answer's own object holds the `saeguard` object already."""

    def enter(self, choices: int) -> int:
        """Count a request of the engine with so many choices; return the index of its first."""
        first = self.choices
        self.choices += choices
        return first

    def flag(self, choice: int, found: Mapping[str, Any], fresh: Iterable[str]) -> None:
        """Add the policies that act since the last flag of a choice that is under way."""
        verdicts = [v for v in found["verdicts"] if v["policy"] in fresh]
        self.flags.append({**found, "choice": choice, "verdicts": verdicts})

    def take_flags(self) -> dict[str, Any] | None:
        """Return one `saeguard` object for the flags that were not sent, None if there are none."""
        flags, self.flags = self.flags, []
        return summarise([(f["choice"], f) for f in flags])

    def tell(self, choice: int, verdicts: Mapping[str, Any]) -> None:
        """Add the verdicts of a choice that has finished."""
        if self.one_answer:
            earlier = self.verdicts.get(0)
            self.verdicts[0] = verdicts if earlier is None else _joined(earlier, verdicts)
        else:
            self.verdicts[choice] = verdicts

    def summary(self, choices: Iterable[int] | None = None) -> dict[str, Any] | None:
        """Return one `saeguard` object for some choices, or all; None if they have no verdicts."""
        picked = sorted(self.verdicts if choices is None else choices)
        return summarise([(i, self.verdicts[i]) for i in picked if i in self.verdicts])

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the headers that tell what was found, none if there are no verdicts."""
        if not self.verdicts:
            return []
        parts = self.verdicts.values()
        policies = {v["policy"]: None for part in parts for v in part["verdicts"]}
        policies |= dict.fromkeys(r.split(":")[1] for r in self.reasons.values())
        flagged = True if self.reasons else _any(part["flagged"] for part in parts)
        found = [(FLAGGED, "unknown" if flagged is None else str(flagged).lower())]
        if policies:
            found.append((POLICIES, ", ".join(policies)))
        return [(name.encode(), value.encode("latin-1", "replace")) for name, value in found]

    def counted(self, usage: Mapping[str, Any]) -> dict[str, int]:
        """Return the counts of a usage that change: they include the tokens that were withheld."""
        tokens = sum(text.tokens for text in self.stops.values())
        return {k: usage[k] + tokens for k in COUNTED if isinstance(usage.get(k), int)}


def _joined(first: Mapping[str, Any], second: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return one `saeguard` object for two steps of one answer: what fired in either."""
    by_policy: dict[str, Mapping[str, Any]] = {}
    for verdict in (*first["verdicts"], *second["verdicts"]):
        earlier = by_policy.get(verdict["policy"])
        if earlier is None or (verdict["score"] or 0.0) > (earlier["score"] or 0.0):
            by_policy[verdict["policy"]] = verdict
    return {
        **max(first, second, key=lambda part: part["coverage"]["tokens"]),
        "flagged": _any((first["flagged"], second["flagged"])),
        "action": strongest_action((first["action"], second["action"])),
        "verdicts": list(by_policy.values()),
        "errors": first["errors"] + second["errors"],
    }


TOLD: ContextVar[Told | None] = ContextVar("saeguard_told", default=None)
"""The record of the client request that is being handled."""


def summarise(parts: list[tuple[int, Mapping[str, Any]]]) -> dict[str, Any] | None:
    """Return one `saeguard` object for several choices, None if there are no verdicts.

    If there are several choices, each verdict names its own.

    Args:
        parts: (choice index, its `saeguard` object), in order.
    """
    if not parts:
        return None
    if len(parts) == 1:
        return dict(parts[0][1])
    return {
        **{key: value for key, value in parts[0][1].items() if key != MESSAGE},
        "flagged": _any(p["flagged"] for _, p in parts),
        "action": strongest_action(p["action"] for _, p in parts),
        "verdicts": [{"choice": i, **v} for i, p in parts for v in p["verdicts"]],
        "coverage": [{"choice": i, **p["coverage"]} for i, p in parts],
        "errors": sum(p["errors"] for _, p in parts),
        "not_evaluated": sum(p["not_evaluated"] for _, p in parts),
        "request_id": [p["request_id"] for _, p in parts],
    }


def _any(flagged: Iterable[bool | None]) -> bool | None:
    """Return whether a choice is flagged; None if none is and one of them was not judged."""
    found = set(flagged)
    return True if True in found else None if None in found else False
