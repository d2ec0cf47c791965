"""Which policies judge a request, settled before it enters the scheduler."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date

from saeguard.policy.access import Access, Decision, decide
from saeguard.reload.versions import Pin

ATTRIBUTE = "saeguard"
"""Where a request keeps its `Admission`."""
ENFORCE = "saeguard_enforce"
"""In a request's extra arguments: shadow policies that it asks to have enforced."""
TENANT = "saeguard_tenant"
"""There, too: whose it is. Set by the API server, whatever the client sent."""
KINDS = 1024
"""Kinds of requests whose decision is remembered; clients can ask in many ways."""


@dataclass(frozen=True, slots=True)
class Admission:
    """What was settled of one request."""

    pin: Pin
    tenant: str | None
    decision: Decision
    enforced: frozenset[tuple[str, str]]
    """Id and mode of each policy that clamps it where it matches."""
    recomputes: bool
    """Whether cached tokens that its list has not seen are computed again."""

    @property
    def clamps(self) -> str:
        """Return the digest of what may edit it."""
        return self.pin.version.clamps

    @property
    def edits(self) -> str:
        """Return what the key of its KV must tell; empty where nothing edits it."""
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
    """Return what is settled of a request; see `saeguard.policy.access.decide`."""
    policies, known = pin.version.watchlist.policies, pin.version.decided
    key = tenant, model, asked, today
    settled = known.get(key)  # once: another thread may clear it
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
