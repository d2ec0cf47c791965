"""Find the role marks of a chat template in conversations that it rendered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import NamedTuple

from saeguard.errors import InputError
from saeguard.guard.roles.assign import START, RoleMarks, StartMark
from saeguard.guard.scopes import ROLES


class TemplateError(InputError):
    """A chat template does not identify roles exactly; the message says why."""


class Part(NamedTuple):
    """The tokens that a template writes before a content, or after the last."""

    role: int | None
    """Role of the content that follows, an index into `ROLES`; None after the last content."""
    ids: tuple[int, ...]


def find_marks(plain: Sequence[Part], every: Sequence[Part], special: set[int]) -> RoleMarks:
    """Return the role marks of a chat template.

    Args:
        plain: parts of conversations with plain contents, whose tokens do not merge with marks.
        every: parts of all conversations.
        special: tokens that ordinary text cannot produce, and `START`.

    Raises:
        TemplateError: no run that begins with a special token identifies a role.
    """
    cores = _cores(list(dict.fromkeys(p for p in plain if p.role is not None)), special)
    starts, ends = [], {part.ids for part in every if part.role is None and part.ids}
    for role, core in cores:
        whole = _common_start(_behind(plain, role, core, cores))
        sure = _common_start([whole, *_behind(every, role, core, cores)])
        starts.append(StartMark(role, (*core, *sure), whole[len(sure) :]))

    def starts_at(ids: tuple[int, ...]) -> list[int]:
        return [at for mark in starts for at in _positions(ids, mark.core)]

    for part in every:
        if part.role is not None and starts_at(part.ids):
            ends.add(part.ids[: min(starts_at(part.ids))])
    return RoleMarks(tuple(starts), tuple(sorted(c for c in ends if c and not starts_at(c))))


def _cores(parts: Sequence[Part], special: set[int]) -> list[tuple[int, tuple[int, ...]]]:
    """Return (role, core) pairs: runs of tokens that identify a role; a part's last run decides."""
    cores: list[tuple[int, tuple[int, ...]]] = []
    open_ = [part for part in parts if _role_after(part, cores) is None]
    while open_:
        found = [(core, part.role) for part in open_ for core in _candidates(part, special)]
        mine = Counter(
            (core, part.role) for part in parts for core in set(_candidates(part, special))
        )
        # `START` is the last resort: such a core identifies only the first message of a text.
        for core, role in sorted(found, key=lambda c: (START in c[0], -mine[c], len(c[0]))):
            assert role is not None
            others = [p for p in parts if p.role != role and _positions(p.ids, core)]
            if all(_role_after(p, [*cores, (role, core)]) == p.role for p in others):
                cores.append((role, core))
                break
        else:
            roles = sorted({ROLES[part.role] for part in open_ if part.role is not None})
            raise TemplateError(
                f"no run that begins with a special token identifies messages of {', '.join(roles)}"
            )
        open_ = [part for part in parts if _role_after(part, cores) != part.role]
    return cores


def _candidates(part: Part, special: set[int]) -> Iterator[tuple[int, ...]]:
    """Yield the runs of a part that begin with a special token; those that begin later first."""
    for i in reversed(range(len(part.ids))):
        if part.ids[i] in special:
            yield from (part.ids[i:j] for j in range(i + 1, len(part.ids) + 1))


def _role_after(part: Part, cores: Sequence[tuple[int, tuple[int, ...]]]) -> int | None:
    """Return the role that the cores give to the content after a part; None if none is in it."""
    found = [
        (at + len(core), at, role) for role, core in cores for at in _positions(part.ids, core)
    ]
    return max(found)[2] if found else None


def _behind(
    parts: Sequence[Part],
    role: int,
    core: tuple[int, ...],
    cores: Sequence[tuple[int, tuple[int, ...]]],
) -> list[tuple[int, ...]]:
    """Return the tokens after the core, in each part of its role that contains it."""
    return [
        part.ids[positions[-1] + len(core) :]
        for part in parts
        if part.role == role
        and _role_after(part, cores) == role
        and (positions := _positions(part.ids, core))
    ]


def _positions(ids: tuple[int, ...], run: tuple[int, ...]) -> list[int]:
    return [i for i in range(len(ids) - len(run) + 1) if ids[i : i + len(run)] == run]


def _common_start(sequences: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the run that all sequences begin with."""
    same = takewhile(lambda column: len(set(column)) == 1, zip(*sequences, strict=False))
    return tuple(column[0] for column in same)
