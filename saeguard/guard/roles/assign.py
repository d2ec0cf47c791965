"""Whose turn each token of a prompt is in, told from its token ids alone: from what the model sees.

A turn goes from its opening up to the next one's. What stands before the first opening, or in a
prompt without any, is the user's: whoever sends text around the chat template is not out of sight.
So is what follows a closing mark that no opening follows, of the turn that it did not end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from saeguard.errors import InputError
from saeguard.guard.scopes import BY_ROLE, ROLES, TEMPLATE, USER

if TYPE_CHECKING:
    from saeguard.guard.watchlist import WatchList  # imports torch, which policy tests do without

START = -1
"""Stands for the beginning of the text, which opens turns where a template has nothing else."""


class StartMark(NamedTuple):
    """How a chat template opens the turns of a role; more than one way makes more than one."""

    role: int
    """Index into `ROLES`."""
    core: tuple[int, ...]
    """Token ids that have to be there, a special token or `START` the first of them."""
    rest: tuple[int, ...]
    """What the template writes after them; less where it runs into the content."""


class RolesError(InputError):
    """A policy's scope is a role, and the model's chat template does not tell that role."""


class RoleMarks(NamedTuple):
    """How a chat template sets turns apart, as token ids; made by `roles.chat_template`."""

    starts: tuple[StartMark, ...]
    ends: tuple[tuple[int, ...], ...]
    """What the template writes before an opening, or last."""

    @property
    def roles(self) -> frozenset[int]:
        """Return the roles that have turns of their own, as indices into `ROLES`."""
        return frozenset(opening.role for opening in self.starts)


def check_roles(watchlist: WatchList, marks: RoleMarks | str) -> None:
    """Refuse policies whose scope is a role that is not told.

    Args:
        watchlist: with the policies.
        marks: of the model's chat template, or why it cannot be told.

    Raises:
        RolesError: names the policy, the reason, and what is allowed.
    """
    for policy in watchlist.policies:
        if policy.scope not in BY_ROLE:
            continue
        told = [] if isinstance(marks, str) else [ROLES[role] for role in sorted(marks.roles)]
        if policy.scope not in told:
            why = marks if isinstance(marks, str) else f"it has no turns of the {policy.scope}"
            raise RolesError(
                f"{policy.path}: scope: {policy.scope}, but the model's chat template does not "
                f"tell it exactly: {why}; allowed here: "
                f"{', '.join(['prompt', 'output', 'both', *told])}"
            )


def roles_of(marks: RoleMarks, tokens: np.ndarray) -> np.ndarray:
    """Return [tokens] uint8, indices into `ROLES`: whose turn each token of a prompt is in.

    Args:
        marks: of the model's chat template.
        tokens: [tokens] ids.
    """
    ids = np.concatenate([[START], np.asarray(tokens, np.int64)])
    at, end, role = _find_starts(marks, ids)
    # Of openings that overlap, the one that ends last holds.
    order = np.lexsort((at, end))
    at, end, role = at[order], end[order], role[order]
    steps = np.zeros(len(ids) + 1, np.int64)
    np.maximum.at(steps, end, np.arange(1, len(end) + 1))
    latest = np.maximum.accumulate(steps)[: len(ids)]
    out = np.concatenate([[USER], role])[latest]
    # The template's marks: an opening with the closing before it, and a closing at the end.
    at, end = np.append(at, len(ids)), np.append(end, len(ids))
    begins = np.min([at, *(_behind(ids, at, closing) for closing in marks.ends)], axis=0)
    edges = np.zeros(len(ids) + 1, np.int64)
    np.add.at(edges, begins, 1)
    np.add.at(edges, end, -1)
    out = np.where(edges.cumsum()[: len(ids)] > 0, TEMPLATE, out)
    roles: np.ndarray = out[1:].astype(np.uint8)
    return roles


def _find_starts(marks: RoleMarks, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return first token, the one behind the last, and role of each opening."""
    found = [(np.empty(0, np.int64),) * 3]
    for opening in marks.starts:
        core, rest = np.array(opening.core), np.array(opening.rest, np.int64)
        at = np.flatnonzero(ids[: max(0, len(ids) - len(core) + 1)] == core[0])
        at = at[(ids[at[:, None] + np.arange(len(core))] == core).all(axis=1)]
        end = at + len(core)
        end = end + _alike(ids, end[:, None] + np.arange(len(rest)), rest)
        found.append((at, end, np.full(len(at), opening.role)))
    at, end, role = (np.concatenate(part) for part in zip(*found, strict=True))
    return at, end, role


def _behind(ids: np.ndarray, at: np.ndarray, closing: tuple[int, ...]) -> np.ndarray:
    """Return where a closing that ends before `at` begins; `at` itself where there is none."""
    where = at[:, None] - len(closing) + np.arange(len(closing))
    whole = _alike(ids, where, np.array(closing, np.int64)) == len(closing)
    begins: np.ndarray = np.where(whole, at - len(closing), at)
    return begins


def _alike(ids: np.ndarray, where: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return how many of the leading tokens at `where` [n, wanted] are those wanted."""
    inside = (where >= 0) & (where < len(ids))
    same = inside & (ids[where.clip(0, len(ids) - 1)] == wanted)
    count: np.ndarray = np.logical_and.accumulate(same, axis=1).sum(axis=1)
    return count
