"""Compare the verdicts of two sets of policies on the same requests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from saeguard.guard.judge import strongest
from saeguard.guard.verdict import Verdict
from saeguard.policy_tools.policy_diff import Pair

ABSENT = "absent"
"""Stands for the verdict of a policy that is only on the other side."""


@dataclass(frozen=True, slots=True)
class Shift:
    """One policy's verdict on one request that differs between the two sets."""

    request: str
    policy: str
    """Id, with the mode."""
    old: str
    new: str
    """Verdicts; `absent` if the policy is missing on that side, `unknown` if undecided."""
    old_score: float | None
    new_score: float | None
    first_token: int | None
    """Position of the first match, on the side that matches."""


@dataclass(frozen=True, slots=True)
class Done:
    """The action on one request that differs between the two sets."""

    request: str
    old: str
    new: str
    """`nothing`, or the strongest action."""


def shifts(
    request: str, found: Iterable[tuple[Pair, Verdict | None, Verdict | None]]
) -> list[Shift]:
    """Return the verdicts on one request that differ.

    A policy that is only on one side counts if it matches.
    """
    changed = []
    for pair, old, new in found:
        before = old.outcome if old else ABSENT
        after = new.outcome if new else ABSENT
        appears = ABSENT in (before, after) and "match" not in (before, after)
        if before == after or appears:
            continue
        where = new if after == "match" else old
        changed.append(
            Shift(
                request=request,
                policy=pair.name,
                old=before,
                new=after,
                old_score=old.score if old else None,
                new_score=new.score if new else None,
                first_token=where.first_token if where else None,
            )
        )
    return changed


def done(request: str, old: Sequence[Verdict], new: Sequence[Verdict]) -> Done | None:
    """Return how the action on a request differs, None if it does not."""
    before, after = _action(old), _action(new)
    return None if before == after else Done(request, before, after)


def _action(verdicts: Sequence[Verdict]) -> str:
    acting = strongest(verdicts)
    return str(acting[0].acted) if acting else "nothing"
