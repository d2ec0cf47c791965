"""List what changed between two sets of policies, key by key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal, TypeAlias

from saeguard.policy.load import locate
from saeguard.policy.types import Policy

Weight: TypeAlias = Literal["verdict", "action", "words"]

WORDS = {"title", "owner", "severity", "rationale", "falsepositives", "review_by"}
ACTION = {"mode", "action", "on_error", "keep", "clamp", "message", "exceptions"}
"""Keys that change actions. Any other key, a future one too, is assumed to change verdicts."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One policy before and after; None on the side where it is missing."""

    old: Policy | None
    new: Policy | None

    @property
    def name(self) -> str:
        """The id, with the mode."""
        policy = self.new or self.old
        assert policy is not None
        return f"{policy.id} {policy.mode}"


@dataclass(frozen=True, slots=True)
class Change:
    """One key that differs."""

    key: str
    """Dotted, as in `detect.shell.above`."""
    old: str
    """As written, `-` if it is missing."""
    new: str
    weight: Weight
    """The most that it can affect."""


def pairs(old: Sequence[Policy], new: Sequence[Policy]) -> list[Pair]:
    """Return the policies of both sets, side by side: by id and mode, then by id alone."""
    after = {(p.id, p.mode): p for p in new}
    before = {(p.id, p.mode): p for p in old}
    left = {key: p for key, p in before.items() if key not in after}
    found = []
    for key, policy in after.items():
        was = before.get(key)
        if was is None:  # shadow became enforce, or the other way round
            moved = next((k for k in left if k[0] == policy.id), None)
            was = left.pop(moved) if moved else None
        found.append(Pair(was, policy))
    found += [Pair(policy, None) for policy in left.values()]
    return sorted(found, key=lambda pair: pair.name)


def changes(pair: Pair) -> list[Change]:
    """Return every key in which two versions of a policy differ; none if one is missing."""
    if pair.old is None or pair.new is None or pair.old.digest == pair.new.digest:
        return []
    old, new = dict(_flat(locate(pair.old).data)), dict(_flat(locate(pair.new).data))
    return [
        Change(key, old.get(key, "-"), new.get(key, "-"), weight(key))
        for key in dict.fromkeys([*new, *old])
        if old.get(key) != new.get(key)
    ]


def weight(key: str) -> Weight:
    """Return the most that a change of this key can affect: verdicts, actions, or only words."""
    top = key.split(".", 1)[0]
    return "words" if top in WORDS else "action" if top in ACTION else "verdict"


def _flat(value: Any, at: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{at}.{key}" if at else key)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            # An exception is identified by its id, not by its index in the list.
            name = item.get("id", i) if isinstance(item, Mapping) else i
            yield from _flat(item, f"{at}.{name}")
    else:
        yield at, value.isoformat() if isinstance(value, date) else str(value)
