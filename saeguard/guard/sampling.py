"""Which requests a policy looks at."""

from __future__ import annotations

import hashlib

from saeguard.policy.types import Policy


def is_sampled(policy: Policy, request_id: str) -> bool:
    """Return whether the policy looks at a request: the same answer wherever it is asked.

    A hash of the policy's id and the request's, so that the policy's versions in shadow and
    enforced look at the same requests, and other policies at others.
    """
    if policy.sample >= 1:
        return True
    found = hashlib.sha256(f"{policy.id}\n{request_id}".encode()).digest()
    return int.from_bytes(found[:8]) < policy.sample * 2**64
