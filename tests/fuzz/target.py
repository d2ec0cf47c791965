"""What one input goes through: nothing but policy errors may come out, in time."""

from __future__ import annotations

import time
from pathlib import Path

from saeguard.policy.types import Policy
from saeguard.policy_tools.test_cases import read_cases
from saeguard.yaml_files.findings import Finding
from tests.policy.example import read_policy

SECONDS = 1.0
"""CPU time that one input may take; a good policy takes less than a thousandth of it."""


class SlowError(Exception):
    """An input took longer than it may."""


class HalfError(Exception):
    """An error or a policy came out that is not whole."""


def read(path: Path, raw: bytes, good: Policy) -> set[str]:
    """Read `raw` as a policy and as the tests of `good`; return what was found in it.

    Args:
        path: where to write it; a file system in memory is quickest.
        raw: the input.
        good: the policy whose tests it might be.

    Raises:
        SlowError: it took too long.
        HalfError: what came out points outside the file, or is both a policy and an error.
    """
    path.write_bytes(raw)
    start = time.process_time()
    policy, errors = read_policy(path)
    cases, of_cases = read_cases(path, good)
    for error in (*errors, *of_cases):
        _whole(error)
    took = time.process_time() - start
    if took > SECONDS:
        raise SlowError(f"{took:.2f} s for {len(raw)} bytes")
    if (policy is None) != bool(errors) or (cases and of_cases):
        raise HalfError(f"policy {policy}, errors {errors}, cases {cases}, errors {of_cases}")
    found = {error.code for error in errors}
    return found | {name for name, read in (("policy", policy), ("tests", cases)) if read}


def _whole(error: Finding) -> None:
    """Refuse an error that does not point at a character of the line it quotes."""
    inside = error.line >= 1 and 1 <= error.column <= len(error.source) + 1
    if not inside or not error.message or error.level not in {"error", "warning"}:
        raise HalfError(f"{error!r} is not whole")
    error.render().encode()
