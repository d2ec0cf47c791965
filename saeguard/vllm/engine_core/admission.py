"""Decide which policies judge a request, before it enters the scheduler."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date

import numpy as np

from saeguard.policy.access import Access, Decision, decide
from saeguard.reload.versions import Pin

KINDS = 1024
"""Most cached decisions. Clients can ask for any number of combinations, so a limit is needed."""


@dataclass(frozen=True, slots=True)
class Admission:
    """The decision about one request: its version, tenant, policies and clamps."""

    pin: Pin
    """Holds the version that judges the request."""
    tenant: str | None
    decision: Decision
    enforced: frozenset[tuple[str, str]]
    """Id and mode of each policy that clamps the request if it matches."""
    recomputes: bool
    """Whether cached tokens without a record for its version are computed again."""
    which: np.ndarray
    """The policies that apply, as indices; requests with the same decision share the array."""

    @property
    def clamps(self) -> str:
        """Return the digest of the clamps of its version."""
        return self.pin.version.clamps

    @property
    def edits(self) -> str:
        """Return a text for the cache salt that identifies the clamps; empty if none may edit."""
        if not self.enforced:
            return ""
        return "\n".join([self.clamps, *(f"{name} {mode}" for name, mode in sorted(self.enforced))])


def admission_of(
    pin: Pin,
    access: Access,
    *,
    tenant: str | None,
    model: str,
    asked: frozenset[str],
    may_enforce: frozenset[str],
    today: date,
) -> Admission:
    """Return the decision about a request; see `policy.access.decide` for the arguments."""
    policies, known = pin.version.watchlist.policies, pin.version.decided
    key = tenant, model, asked, today
    settled = known.get(key)  # read once: another thread may clear the table
    if settled is None:
        if len(known) >= KINDS:
            known.clear()
        decision = decide(
            policies,
            access,
            tenant=tenant,
            model=model,
            asked=asked,
            may_enforce=may_enforce,
            today=today,
        )
        acting = [p for p, acts in zip(policies, decision.enforced, strict=True) if acts]
        clamps = frozenset((p.id, p.mode) for p in acting if p.action == "clamp")
        recomputes = any(p.uncached == "recompute" for p in acting)
        settled = decision, clamps, recomputes, np.flatnonzero(decision.applies)
        known[key] = settled
    return Admission(pin, tenant, *settled)
