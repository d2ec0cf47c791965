"""Which policies judge a request, decided before the request enters the scheduler."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date

from saeguard.policy.access import Access, Decision, decide
from saeguard.reload.versions import Pin

KINDS = 1024
"""Kinds of requests whose decision is kept; clients can vary what they ask for without limit."""


@dataclass(frozen=True, slots=True)
class Admission:
    """What was decided about one request."""

    pin: Pin
    """Holds the version that judges the request."""
    tenant: str | None
    decision: Decision
    enforced: frozenset[tuple[str, str]]
    """Id and mode of each policy that clamps the request if it matches."""
    recomputes: bool
    """Whether cached tokens that its version has not seen are computed again."""

    @property
    def clamps(self) -> str:
        """Return the digest of the clamps of its version."""
        return self.pin.version.clamps

    @property
    def edits(self) -> str:
        """Return what must go into the key of its KV cache; empty if no policy may edit it."""
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
    """Return the decision about a request; the arguments are those of `policy.access.decide`."""
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
        settled = decision, clamps, any(p.uncached == "recompute" for p in acting)
        known[key] = settled
    return Admission(pin, tenant, *settled)
