"""Name what a new watch list has in place of an old one."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from saeguard.guard.watchlist import WatchList


@dataclass(frozen=True, slots=True)
class Difference:
    """Ids of policies, and names of feature sets, that came, vanished or changed; sorted."""

    came: tuple[str, ...] = ()
    vanished: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    """Policies whose content, mode or feature set differs."""
    feature_sets: tuple[str, ...] = ()
    """Feature sets in use whose content differs."""
    no_longer_enforced: tuple[str, ...] = ()
    """Policies of `vanished` and `changed` that were enforced and are not any more."""

    def in_words(self, most: int = 20) -> str:
        """Return the difference for a log line or a terminal; at most `most` names of a kind."""
        kinds = (
            ("came", self.came),
            ("vanished", self.vanished),
            ("changed", self.changed),
            ("feature sets changed", self.feature_sets),
            ("no longer enforced", self.no_longer_enforced),
        )
        return "; ".join(f"{kind}: {_some(names, most)}" for kind, names in kinds if names)


def _some(names: tuple[str, ...], most: int) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def difference(old: WatchList, new: WatchList) -> Difference:
    """Return what differs between two watch lists.

    An id may stand for two policies, one in shadow and one enforced.
    """
    before, after = _by_id(old), _by_id(new)
    enforced = {p.id for p in old.policies if p.mode == "enforce"}
    enforced -= {p.id for p in new.policies if p.mode == "enforce"}
    both = old.feature_sets.keys() & new.feature_sets.keys()
    return Difference(
        came=tuple(sorted(after.keys() - before)),
        vanished=tuple(sorted(before.keys() - after)),
        changed=tuple(sorted(p for p in before.keys() & after if before[p] != after[p])),
        feature_sets=tuple(sorted(n for n in both if old.feature_sets[n] != new.feature_sets[n])),
        no_longer_enforced=tuple(sorted(enforced)),
    )


def _by_id(watchlist: WatchList) -> dict[str, set[tuple[str, str, str | None]]]:
    found: dict[str, set[tuple[str, str, str | None]]] = defaultdict(set)
    for policy in watchlist.policies:
        content = watchlist.feature_sets.get(policy.feature_set)
        found[policy.id].add((policy.mode, policy.digest, content))
    return dict(found)
