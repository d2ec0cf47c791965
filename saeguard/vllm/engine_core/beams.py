"""Name the enforced policies that beam search would evade, for the API server, which refuses it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saeguard.guard.scopes import LOOKS

if TYPE_CHECKING:
    from saeguard.vllm.engine_core.guard import EngineGuard


def against_beams(
    guard: EngineGuard, tenant: str | None, adapter: str | None, asked: str | None
) -> list[str]:
    """Return the policies that are enforced for such a request and that beam search evades.

    Each step of a beam is a request of one token. What a beam wrote before is prompt to it, so
    policies that look at the output never see it, and a stop would end one step of one beam.
    """
    admission = guard.decide(tenant, adapter, asked)
    policies = admission.pin.version.watchlist.policies
    return [
        policy.id
        for policy, acts in zip(policies, admission.decision.enforced, strict=True)
        if acts and ("output" in LOOKS[policy.scope] or "stop" in (policy.action, policy.on_error))
    ]
