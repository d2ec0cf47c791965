"""The account as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2

from demo.account import OUTCOMES, Account, Hit, RequestView, Token, Trace
from demo.curves import Curves
from demo.terminal import clamp_line
from demo.timeline import Timeline, pick, warm
from saeguard.guard.scopes import LOOKS

HERE = Path(__file__).resolve().parent
TEMPLATE = "report.html.j2"
FAINT = 0.04
"""Shares below this get no colour."""


def render(account: Account, curves: Curves | None = None) -> str:
    """Return the page. Model output is untrusted: everything is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "words": words}
    line = pick(account)
    return environment.get_template(TEMPLATE).render(
        account=account,
        title=title(account),
        curves=curves,
        line=line,
        line_words=line_words(line) if line else "",
        outcomes=OUTCOMES,
        segments=segments,
        heat=heat,
        visible=visible,
        other_traces=other_traces,
        tip=tip,
        clamp_line=clamp_line,
        px=lambda line, token: f"{line.x(token):.1f}",
        width=lambda line, span: f"{line.x(span.tokens):.1f}",
        warm=_warm,
    )


def title(account: Account) -> str:
    """Return the headline."""
    said = f"{len(account.flagged)} of {len(account.views)} requests were flagged"
    noticed = len(account.noticed)
    return f"{said}, and {noticed} more matched in shadow" if noticed else said


def percent(value: float) -> str:
    """Write a share, without rounding anything up to 100."""
    text = f"{100 * value:.1f}"
    return "99.9 %" if text == "100.0" and value < 1 else f"{text.removesuffix('.0')} %"


def words(name: str) -> str:
    """Write a name for reading."""
    return name.replace("_", " ")


def heat(token: Token) -> str:
    """Return the token's colour as a CSS percentage, 0 if there is none."""
    return "0" if token.heat < FAINT else f"{100 * token.heat:.0f}"


def tip(trace: Trace, position: int, token: Token) -> str:
    """Return what hovering shows."""
    if token.skipped:
        return f"token {position}: not evaluated, {words(token.skipped)}"
    said = f"token {position}: share {token.share:.2f}, threshold {trace.above:g}"
    said += "" if token.role in LOOKS[trace.scope] else ", outside the policy's scope"
    return f"{said}; first match" if position == trace.first else said


def visible(token: Token) -> tuple[str, str]:
    """Return what is coloured and what follows it: a line break is shown as a sign of its own."""
    if "\n" in token.text and not token.text.strip():
        return "⏎", token.text
    return token.text, ""


def other_traces(view: RequestView) -> list[tuple[Hit, Trace]]:
    """Return the features behind a request's matches but for the one shown, each once."""
    first: dict[str, tuple[Hit, Trace]] = {}
    for hit in view.seen:
        for trace in hit.traces:
            first.setdefault(f"{hit.policy.feature_set}/{trace.feature}", (hit, trace))
    return [pair for pair in first.values() if pair[1] is not view.trace]


def segments(trace: Trace) -> Iterator[dict[str, Any]]:
    """Cut a text into parts of one `role`, with `tokens` and their places.

    What the chat template wrote around the messages is left out, but for tokens in the policy's
    scope that are above its threshold.
    """
    part: dict[str, Any] = {"role": "", "tokens": []}
    for position, token in enumerate(trace.tokens):
        if token.role == "template" and not trace.over(token):
            continue
        if token.skipped == "special_token" and token.role != "output":
            continue
        if token.role != part["role"]:
            if part["tokens"]:
                yield part
            part = {"role": token.role, "tokens": []}
        part["tokens"].append((position, token))
    if part["tokens"]:
        yield part


def line_words(line: Timeline) -> str:
    """Describe a timeline: its tokens, when it was flagged, what was skipped and why."""
    answer = line.view.answer
    first = line.view.seen[0]
    output = line.tokens - line.prompt_tokens
    said = [f"{line.prompt_tokens} prompt tokens, {output} output tokens, {answer.seconds:.1f} s."]
    verb = "flagged" if line.view.flagged else "matched in shadow"
    arrived = line.seconds(first.first_token)
    if arrived is None:
        said.append(f"It was {verb} at prompt token {first.first_token}, before its first answer.")
    else:
        read = line.seconds(first.first_token + 1)
        later = "" if read is None else f", and was read in the next step, by {read:.2f} s"
        said.append(
            f"It was {verb} at token {first.first_token}, which the client received after "
            f"{arrived:.2f} s{later}."
        )
    skipped: Sequence[str] = [f"{n} {words(reason)}" for reason, n in line.reasons.items()]
    said.append(f"Skipped, in black: {', '.join(skipped) or 'none'}.")
    return " ".join(said)


def _warm(tokens: Sequence[Token]) -> list[tuple[int, float]]:
    return list(warm(tokens, FAINT))
