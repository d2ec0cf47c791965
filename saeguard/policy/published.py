"""Published latents may log, not act: they were not measured on the operator's traffic."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from saeguard.policy.load import locate
from saeguard.policy.types import Policy
from saeguard.yaml_files.findings import Finding, show

Status = Literal["calibrated", "published"]


def acts_on_published(
    policy: Policy, status: Status, may_enforce: Collection[str] = ()
) -> Finding | None:
    """Return an error if a policy would act on published latents, None otherwise.

    Args:
        policy: to be served.
        status: of its feature set.
        may_enforce: ids of shadow policies that requests may ask to have enforced.
    """
    enforced = policy.mode == "enforce" or policy.id in may_enforce
    if status != "published" or policy.action == "log" or not enforced:
        return None
    message = (
        f"mode: {policy.mode} with action {policy.action}, but the feature set "
        f"{show(policy.feature_set)} holds published ids that were never measured here; "
        "`mode: shadow` or `action: log` work at once, and `saeguard features calibrate` on your "
        "own traffic makes the set one that may act"
    )
    return locate(policy).error("not-calibrated", message, ("mode",))
