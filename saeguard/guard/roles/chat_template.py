"""From a model's tokenizer and chat template to the token ids that open and close turns.

Conversations are rendered whose contents are known, so that everything else is known to be the
template's. What of it tells a turn's role is what is looked for in prompts. It must begin with a
token that ordinary text cannot become, and must give back every token of further conversations
whose contents are awkward; a template of which that is not true is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np

from saeguard.errors import InputError
from saeguard.guard.roles.assign import START, RoleMarks, StartMark, roles_of
from saeguard.guard.scopes import ASSISTANT, ROLES, TEMPLATE

SHAPES = (
    ("user",),
    ("user", "assistant"),
    ("user", "assistant", "user"),
    ("user", "assistant", "user", "assistant"),
    ("user", "assistant", "user", "assistant", "user"),
    ("system", "user"),
    ("system", "user", "assistant", "user"),
    ("user", "assistant", "tool", "assistant", "user"),
    ("user", "assistant", "tool", "tool"),
)
"""Who speaks, in the conversations that are rendered; a template may refuse some."""
PLAIN = ("the first red word", "a second green line", "blue is third here", "fourth and grey",
         "a fifth of white")  # fmt: skip
ODD = (
    ("\n\nnew lines\n\n", " spaces  ", "[1, 2]\n", "a", "\t"),
    ("user", "assistant\n", ": system", "</tool>", "## Response:"),
    ("\u65e5\u672c\u8a9e", "caf\u00e9 \U0001f600", "\u00df\u0301", "\u202fx", "0"),
    ("<|", "[/", "<", "|>", ">\n"),
)
"""Contents that might run into a template's marks, each said by everybody once."""
CLOCKS = ("01 Jan 2001", "28 Feb 2034")
"""What templates that tell the day are told."""


class TemplateError(InputError):
    """A chat template does not tell roles apart exactly; says why."""


class Part(NamedTuple):
    """What a template writes before a content, or behind the last."""

    role: int | None
    """Of the content that follows, an index into `ROLES`; None behind the last."""
    ids: tuple[int, ...]


class Rendered(NamedTuple):
    """A conversation as token ids, and which of them hold which message's content."""

    ids: tuple[int, ...]
    owner: np.ndarray
    """[tokens] index of the message, -1 for what the template wrote."""
    roles: tuple[int, ...]
    """By message; one more where the template opens the assistant's turn at the end."""


def read_template(tokenizer: Any) -> RoleMarks:
    """Return how turns are set apart, as the tokenizer's chat template does it.

    A template that folds one role into another's turn, or cannot say it, tells the others.

    Args:
        tokenizer: a fast one of Transformers.

    Raises:
        TemplateError: there is no chat template, or it cannot be told exactly.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise TemplateError("the model has no chat template")
    if not getattr(tokenizer, "is_fast", False):
        raise TemplateError("its tokenizer does not say which token stands for which characters")
    refused: TemplateError | None = None
    for without in (set(), {"tool"}, {"system"}, {"system", "tool"}):
        shapes = [shape for shape in SHAPES if not without & set(shape)]
        try:
            return _read(tokenizer, shapes)
        except TemplateError as error:
            refused = error
    assert refused is not None
    raise refused


def role_marks_of(tokenizer: Any) -> RoleMarks | str:
    """Return how turns are set apart, or why that cannot be told."""
    try:
        return read_template(tokenizer)
    except TemplateError as error:
        return str(error)


def _read(tokenizer: Any, shapes: Sequence[tuple[str, ...]]) -> RoleMarks:
    plain: list[Rendered | None] = []
    awkward: list[Rendered | None] = []
    for shape in shapes:
        for prompt in (False, True):
            if prompt and shape[-1] == "assistant":
                continue
            for clock in CLOCKS:
                gaps = _gaps(tokenizer, shape, clock, prompt=prompt)
                if gaps is None:
                    continue
                found = [
                    _render(tokenizer, shape, c, clock, gaps, prompt=prompt)
                    for c in (PLAIN, *(odd[i:] + odd[:i] for odd in ODD for i in range(len(odd))))
                ]
                plain.append(found[0])
                awkward += found[1:]
    if not plain:
        raise TemplateError("it renders none of the conversations that it was tried on")
    rendered = [r for r in (*plain, *awkward) if r is not None]
    marks = _role_marks(
        [part for r in plain if r is not None for part in _parts(r)],
        [part for r in rendered for part in _parts(r)],
        {START, *tokenizer.added_tokens_decoder},
    )
    for one in rendered:
        _check(tokenizer, marks, one)
    return marks


# --- conversations as tokens --------------------------------------------------------------------


def _text(
    tokenizer: Any, shape: tuple[str, ...], contents: Sequence[str], clock: str, *, prompt: bool
) -> str:
    messages = [{"role": r, "content": c} for r, c in zip(shape, contents, strict=False)]
    text: str = tokenizer.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=prompt,
        strftime_now=lambda _format: clock,
        date_string=clock,
    )
    return text


def _gaps(tokenizer: Any, shape: tuple[str, ...], clock: str, *, prompt: bool) -> list[str] | None:
    """Return what the template writes around contents; None where it refuses the conversation."""
    try:
        text = _text(tokenizer, shape, PLAIN, clock, prompt=prompt)
    except Exception:  # noqa: BLE001 - a template raises whatever it likes
        return None
    gaps = []
    for content in PLAIN[: len(shape)]:
        gap, found, text = text.partition(content)
        if not found:
            raise TemplateError(f"it leaves out messages of {', '.join(shape)}")
        gaps.append(gap)
    return [*gaps, text]


def _render(
    tokenizer: Any,
    shape: tuple[str, ...],
    contents: Sequence[str],
    clock: str,
    gaps: Sequence[str],
    *,
    prompt: bool,
) -> Rendered | None:
    """Render a conversation, None where nothing is left of a content, or a tool's is rewritten."""
    text = _text(tokenizer, shape, contents, clock, prompt=prompt)
    spans, at = [], len(gaps[0])
    for content, gap in zip(contents[: len(shape)], gaps[1:], strict=True):
        forms = (content, content.strip(), content.lstrip(), content.rstrip())
        form = next((f for f in forms if text.startswith(f + gap, at)), None)
        if form is None:
            if "tool" in shape:
                return None
            raise TemplateError(f"it does not write {content!r} as it was said")
        if not form:  # cut down to nothing
            return None
        spans.append((at, at + len(form)))
        at += len(form) + len(gap)
    read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    first, last = np.array(read["offset_mapping"]).reshape(-1, 2).T
    owner = np.full(len(first), -1)
    for i, (a, b) in enumerate(spans):
        owner[(first < b) & (last > a)] = i  # a token that is partly content is content
    roles = [ROLES.index(role) for role in shape]
    return Rendered(tuple(read["input_ids"]), owner, (*roles, *([ASSISTANT] if prompt else [])))


def _parts(rendered: Rendered) -> Iterator[Part]:
    """Yield what the template wrote before each content, and behind the last."""
    edge = 0
    messages = int(rendered.owner.max()) + 1
    for i in range(messages):
        at = np.flatnonzero(rendered.owner == i)
        if len(at):  # an empty content has no token
            gap = rendered.ids[edge : at[0]]
            if (rendered.owner[edge : at[0]] < 0).all():
                yield Part(rendered.roles[i], (*([START] if i == 0 else []), *gap))
            edge = int(at[-1]) + 1
    opened = rendered.roles[messages] if len(rendered.roles) > messages else None
    yield Part(opened, rendered.ids[edge:])


# --- what tells a role --------------------------------------------------------------------------


def _role_marks(plain: Sequence[Part], every: Sequence[Part], special: set[int]) -> RoleMarks:
    """Return the openings and closings.

    Args:
        plain: of contents that run into nothing.
        every: of all contents.
        special: tokens that ordinary text cannot become, and `START`.

    Raises:
        TemplateError: nothing that begins with a special token tells a role.
    """
    cores = _cores(list(dict.fromkeys(p for p in plain if p.role is not None)), special)
    starts, ends = [], {part.ids for part in every if part.role is None and part.ids}
    for role, core in cores:
        whole = _alike(_behind(plain, role, core, cores))
        sure = _alike([whole, *_behind(every, role, core, cores)])
        starts.append(StartMark(role, (*core, *sure), whole[len(sure) :]))

    def opens(ids: tuple[int, ...]) -> list[int]:
        return [at for opening in starts for at in _places(ids, opening.core)]

    for part in every:
        if part.role is not None and opens(part.ids):
            ends.add(part.ids[: min(opens(part.ids))])
    return RoleMarks(tuple(starts), tuple(sorted(c for c in ends if c and not opens(c))))


def _cores(parts: Sequence[Part], special: set[int]) -> list[tuple[int, tuple[int, ...]]]:
    """Return for each role the fewest tokens that tell it: the last of them in a part holds."""
    cores: list[tuple[int, tuple[int, ...]]] = []
    open_ = [part for part in parts if _told(part, cores) is None]
    while open_:
        found = [(core, part.role) for part in open_ for core in _candidates(part, special)]
        mine = Counter(
            (core, part.role) for part in parts for core in set(_candidates(part, special))
        )
        # The beginning of the text is the last resort: with it, a turn is known nowhere else.
        for core, role in sorted(found, key=lambda c: (START in c[0], -mine[c], len(c[0]))):
            assert role is not None
            others = [p for p in parts if p.role != role and _places(p.ids, core)]
            if all(_told(p, [*cores, (role, core)]) == p.role for p in others):
                cores.append((role, core))
                break
        else:
            roles = sorted({ROLES[part.role] for part in open_ if part.role is not None})
            raise TemplateError(
                f"nothing that begins with a special token tells a turn of {', '.join(roles)}"
            )
        open_ = [part for part in parts if _told(part, cores) != part.role]
    return cores


def _candidates(part: Part, special: set[int]) -> Iterator[tuple[int, ...]]:
    """Yield runs of a part that begin with a special token, those that begin last first."""
    for i in reversed(range(len(part.ids))):
        if part.ids[i] in special:
            yield from (part.ids[i:j] for j in range(i + 1, len(part.ids) + 1))


def _told(part: Part, cores: Sequence[tuple[int, tuple[int, ...]]]) -> int | None:
    """Return the role that the cores tell of what follows a part."""
    found = [(at + len(core), at, role) for role, core in cores for at in _places(part.ids, core)]
    return max(found)[2] if found else None


def _behind(
    parts: Sequence[Part],
    role: int,
    core: tuple[int, ...],
    cores: Sequence[tuple[int, tuple[int, ...]]],
) -> list[tuple[int, ...]]:
    """Return what follows a core that tells the role of what follows its part."""
    return [
        part.ids[places[-1] + len(core) :]
        for part in parts
        if part.role == role and _told(part, cores) == role and (places := _places(part.ids, core))
    ]


def _places(ids: tuple[int, ...], run: tuple[int, ...]) -> list[int]:
    return [i for i in range(len(ids) - len(run) + 1) if ids[i : i + len(run)] == run]


def _alike(sequences: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return what all begin with."""
    same = takewhile(lambda column: len(set(column)) == 1, zip(*sequences, strict=False))
    return tuple(column[0] for column in same)


def _check(tokenizer: Any, marks: RoleMarks, rendered: Rendered) -> None:
    """Check that a conversation's tokens are told as its messages have it.

    Raises:
        TemplateError: names the first token that is not.
    """
    found = roles_of(marks, np.array(rendered.ids))
    allowed = np.full((len(found), len(ROLES)), False)
    messages = rendered.owner.max() + 1
    following = np.full(len(found), messages)
    for i in reversed(range(messages)):
        at = np.flatnonzero(rendered.owner == i)
        if len(at):
            following[: at[0]] = i
            allowed[at, rendered.roles[i]] = True
    nobody = rendered.owner < 0
    allowed[nobody, TEMPLATE] = True
    # What a template says itself may stand in the turn that follows, or before the first in one
    # of its own.
    for i, role in enumerate(rendered.roles):
        allowed[nobody & (following == i), role] = True
    allowed[nobody & (following == 0)] = True
    wrong = np.flatnonzero(~allowed[np.arange(len(found)), found])
    if len(wrong):
        t = int(wrong[0])
        where = tokenizer.decode(rendered.ids[max(0, t - 3) : t + 4])
        owner = rendered.owner[t]
        due = "template" if owner < 0 else ROLES[rendered.roles[owner]]
        raise TemplateError(
            f"in {where!r} the token {tokenizer.decode([rendered.ids[t]])!r} is {due}'s, and would "
            f"be taken for {ROLES[found[t]]}'s"
        )
