"""Read from a chat template the token ids that delimit messages: its role marks.

The template renders conversations whose contents are known, so every other token is the template's.
`find_marks` looks for the tokens that identify a role. They must begin with a special token, which
ordinary text cannot produce. They must also give the right role to every token of further
conversations with awkward contents. A template that fails is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from saeguard.guard.roles.assign import START, RoleMarks, roles_of
from saeguard.guard.roles.find_marks import Part, TemplateError, find_marks
from saeguard.guard.scopes import ASSISTANT, CONTINUED, ROLES, TEMPLATE

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
"""The roles of the rendered conversations' messages; a template may refuse some."""
PLAIN = ("the first red word", "a second green line", "blue is third here", "fourth and grey",
         "a fifth of white")  # fmt: skip
ODD = (
    ("\n\nnew lines\n\n", " spaces  ", "[1, 2]\n", "a", "\t"),
    ("user", "assistant\n", ": system", "</tool>", "## Response:"),
    ("\u65e5\u672c\u8a9e", "caf\u00e9 \U0001f600", "\u00df\u0301", "\u202fx", "0"),
    ("<|", "[/", "<", "|>", ">\n"),
)
"""Contents whose tokens might merge with a template's marks; each role writes each of them."""
CLOCKS = ("01 Jan 2001", "28 Feb 2034")
"""Two dates, for templates that write the current date."""


class Rendered(NamedTuple):
    """A rendered conversation as token ids, and the message that each token belongs to."""

    ids: tuple[int, ...]
    owner: np.ndarray
    """[tokens] index of the message; -1 for tokens that the template wrote."""
    roles: tuple[int, ...]
    """By message; one more if the template opens an answer of the assistant at the end."""


def read_template(tokenizer: Any) -> RoleMarks:
    """Return the role marks of the tokenizer's chat template.

    If the template refuses messages of `tool` or `system`, or merges them into another role's, that
    role gets no marks.

    Args:
        tokenizer: a fast tokenizer of Transformers.

    Raises:
        TemplateError: there is no chat template, or it does not identify roles exactly.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise TemplateError("the model has no chat template")
    if not getattr(tokenizer, "is_fast", False):
        raise TemplateError("its tokenizer does not report the characters of each token")
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
    """Return the role marks of the tokenizer's chat template, or why it has none."""
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
        raise TemplateError("it renders none of the test conversations")
    rendered = [r for r in (*plain, *awkward) if r is not None]
    marks = find_marks(
        [part for r in plain if r is not None for part in _parts(r)],
        [part for r in rendered for part in _parts(r)],
        {START, *tokenizer.added_tokens_decoder},
    )
    marks = marks._replace(openings=_openings(marks, rendered))
    for one in rendered:
        _check(tokenizer, marks, one)
    return marks


def _openings(marks: RoleMarks, rendered: Sequence[Rendered]) -> tuple[tuple[int, ...], ...]:
    """Return what the template writes behind the start mark of an answer that it opens."""
    found = set()
    for one in rendered:
        if len(one.roles) > one.owner.max() + 1:
            behind = int((roles_of(marks, np.array(one.ids)) == CONTINUED).sum())
            found.add(one.ids[len(one.ids) - behind :])
    return tuple(sorted(found - {()}, key=len, reverse=True))


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
    """Return the template's text around the contents; None if it refuses the conversation."""
    try:
        text = _text(tokenizer, shape, PLAIN, clock, prompt=prompt)
    except Exception:  # noqa: BLE001 - a template may raise anything
        return None
    gaps = []
    for content in PLAIN[: len(shape)]:
        gap, found, text = text.partition(content)
        if not found:
            raise TemplateError(f"it omits messages of {', '.join(shape)}")
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
    """Render a conversation; None if a content is stripped to nothing, or a tool's is rewritten."""
    text = _text(tokenizer, shape, contents, clock, prompt=prompt)
    spans, at = [], len(gaps[0])
    for content, gap in zip(contents[: len(shape)], gaps[1:], strict=True):
        forms = (content, content.strip(), content.lstrip(), content.rstrip())
        form = next((f for f in forms if text.startswith(f + gap, at)), None)
        if form is None:
            if "tool" in shape:
                return None
            raise TemplateError(f"it does not write the content {content!r} unchanged")
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
    """Yield the tokens that the template wrote before each content, and after the last."""
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


def _check(tokenizer: Any, marks: RoleMarks, rendered: Rendered) -> None:
    """Check that the marks give each token of a conversation its message's role.

    Raises:
        TemplateError: names the first token with another role.
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
    # At the end of a text an answer without an end mark is one that the model is to continue.
    if rendered.roles[-1] == ASSISTANT and len(rendered.roles) == messages:
        allowed[following >= messages - 1, CONTINUED] = True
    written = rendered.owner < 0
    allowed[written, TEMPLATE] = True
    # A template's own text may count to the message that follows; before the first message, to any
    # role.
    for i, role in enumerate(rendered.roles):
        allowed[written & (following == i), role] = True
    allowed[written & (following == 0)] = True
    wrong = np.flatnonzero(~allowed[np.arange(len(found)), found])
    if len(wrong):
        t = int(wrong[0])
        where = tokenizer.decode(rendered.ids[max(0, t - 3) : t + 4])
        owner = rendered.owner[t]
        expected = "template" if owner < 0 else ROLES[rendered.roles[owner]]
        raise TemplateError(
            f"in {where!r} the token {tokenizer.decode([rendered.ids[t]])!r}: expected role "
            f"{expected}, got {ROLES[found[t]]}"
        )
