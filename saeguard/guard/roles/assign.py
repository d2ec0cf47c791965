"""Assign a role to each token of a prompt, from the token ids alone.

A message reaches from its start mark to the next one. Text before the first start mark, or in a
prompt without any, is the user's, so text that bypasses the chat template stays in scope. Text
between an end mark and the next start mark belongs to the message before it. What stands after the
assistant's last start mark, at the end of the prompt and without an end mark, is an answer that the
model is to continue.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from saeguard.errors import InputError
from saeguard.guard.scopes import ASSISTANT, BY_ROLE, CONTINUED, ROLES, TEMPLATE, USER

if TYPE_CHECKING:
    from saeguard.guard.watchlist import WatchList  # imports torch, which policy tests do without

START = -1
"""Stands for the beginning of the text: some templates put no token before the first message."""


class StartMark(NamedTuple):
    """Tokens by which a chat template starts a message of a role; a role may have several marks."""

    role: int
    """Index into `ROLES`."""
    core: tuple[int, ...]
    """Token ids that must be present; the first is a special token or `START`."""
    rest: tuple[int, ...]
    """Token ids that follow; the last of them may have merged with the content."""


class RolesError(InputError):
    """A policy's scope is a role that the model's chat template does not identify."""


class RoleMarks(NamedTuple):
    """The token ids by which a chat template delimits messages; see `roles.chat_template`."""

    starts: tuple[StartMark, ...]
    ends: tuple[tuple[int, ...], ...]
    """Token ids that the template writes before a start mark, or at the end of the text."""
    openings: tuple[tuple[int, ...], ...] = ()
    """Token ids that the template writes behind a start mark when it opens an answer, the longest
    first: an empty thought, for example."""

    @property
    def roles(self) -> frozenset[int]:
        """Return the roles that have start marks, as indices into `ROLES`."""
        return frozenset(mark.role for mark in self.starts)


def check_roles(watchlist: WatchList, marks: RoleMarks | str) -> None:
    """Refuse policies whose scope is a role that the chat template does not identify.

    Args:
        watchlist: with the policies.
        marks: of the model's chat template, or why it has none.

    Raises:
        RolesError: names the policy, the reason, and what is allowed.
    """
    identified = [] if isinstance(marks, str) else [ROLES[role] for role in sorted(marks.roles)]
    for policy in watchlist.policies:
        if policy.scope in BY_ROLE and policy.scope not in identified:
            why = marks if isinstance(marks, str) else f"it has no messages of the {policy.scope}"
            raise RolesError(
                f"{policy.path}: scope: {policy.scope}, but the model's chat template does not "
                f"identify that role exactly: {why}; allowed here: "
                f"{', '.join(['prompt', 'output', 'both', *identified])}"
            )


def roles_of(marks: RoleMarks, tokens: np.ndarray) -> np.ndarray:
    """Return the role of each token of a prompt: [tokens] uint8, indices into `ROLES`.

    Args:
        marks: of the model's chat template.
        tokens: [tokens] ids.
    """
    ids = np.concatenate([[START], np.asarray(tokens, np.int64)])
    at, end, role = _find_starts(marks, ids)
    # Of start marks that overlap, the one that ends last counts.
    order = np.lexsort((at, end))
    at, end, role = at[order], end[order], role[order]
    steps = np.zeros(len(ids) + 1, np.int64)
    np.maximum.at(steps, end, np.arange(1, len(end) + 1))
    latest = np.maximum.accumulate(steps)[: len(ids)]
    out = np.concatenate([[USER], role])[latest]
    if out[-1] == ASSISTANT and len(ids) not in end:  # there, nothing of the answer is there yet
        first = int(np.searchsorted(latest, latest[-1]))
        part = tuple(ids[first:].tolist())
        opening = next((o for o in marks.openings if part[: len(o)] == o), ())
        out[first : first + len(opening)] = TEMPLATE
        out[first + len(opening) :] = CONTINUED
    # Tokens of the template: a start mark with the end mark before it, and an end mark at the end.
    at, end = np.append(at, len(ids)), np.append(end, len(ids))
    begins = np.min([at, *(_behind(ids, at, end_mark) for end_mark in marks.ends)], axis=0)
    if begins[-1] < len(ids):  # the last message is finished
        out[out == CONTINUED] = ASSISTANT
    edges = np.zeros(len(ids) + 1, np.int64)
    np.add.at(edges, begins, 1)
    np.add.at(edges, end, -1)
    out = np.where(edges.cumsum()[: len(ids)] > 0, TEMPLATE, out)
    roles: np.ndarray = out[1:].astype(np.uint8)
    return roles


def continued_roles(marks: RoleMarks, tokens: np.ndarray) -> np.ndarray | None:
    """Return the role of each token of a prompt that ends with a part of the answer, else None."""
    answers = [_whole(mark) for mark in marks.starts if mark.role == ASSISTANT]
    ends = [answer + opening for answer in answers for opening in ((), *marks.openings)]
    ids = (START, *np.asarray(tokens)[-max(map(len, ends), default=1) :].tolist())
    if any(ids[-len(end) :] == end for end in ends):
        return None  # nearly every chat: the template opens an answer, and nothing follows
    roles = roles_of(marks, tokens)
    return roles if len(roles) and roles[-1] == CONTINUED else None


def _whole(mark: StartMark) -> tuple[int, ...]:
    return (*mark.core, *mark.rest)


def _find_starts(marks: RoleMarks, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the first position, the position after the last, and the role of each start mark."""
    found = [(np.empty(0, np.int64),) * 3]
    for mark in marks.starts:
        core, rest = np.array(mark.core), np.array(mark.rest, np.int64)
        at = np.flatnonzero(ids[: max(0, len(ids) - len(core) + 1)] == core[0])
        at = at[(ids[at[:, None] + np.arange(len(core))] == core).all(axis=1)]
        end = at + len(core)
        end = end + _alike(ids, end[:, None] + np.arange(len(rest)), rest)
        found.append((at, end, np.full(len(at), mark.role)))
    at, end, role = (np.concatenate(part) for part in zip(*found, strict=True))
    return at, end, role


def _behind(ids: np.ndarray, at: np.ndarray, end_mark: tuple[int, ...]) -> np.ndarray:
    """Return where the end mark that ends just before `at` begins; `at` if no mark does."""
    where = at[:, None] - len(end_mark) + np.arange(len(end_mark))
    whole = _alike(ids, where, np.array(end_mark, np.int64)) == len(end_mark)
    begins: np.ndarray = np.where(whole, at - len(end_mark), at)
    return begins


def _alike(ids: np.ndarray, where: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return how many of the leading tokens at `where` [n, wanted] equal `wanted`."""
    inside = (where >= 0) & (where < len(ids))
    same = inside & (ids[where.clip(0, len(ids) - 1)] == wanted)
    count: np.ndarray = np.logical_and.accumulate(same, axis=1).sum(axis=1)
    return count
