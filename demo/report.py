"""The account as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2

from demo.account import OUTCOMES, Account, Hit, RequestView, Token, Trace
from demo.terminal import clamp_line

HERE = Path(__file__).resolve().parent
TEMPLATE = "report.html.j2"
FAINT = 0.04
"""Shares below this get no colour."""


def render(account: Account) -> str:
    """Return the page. Model output is untrusted: everything is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "words": words}
    page = environment.get_template(TEMPLATE)
    return page.render(
        account=account,
        outcomes=OUTCOMES,
        segments=segments,
        heat=heat,
        visible=visible,
        other_traces=other_traces,
        tip=tip,
        clamp_line=clamp_line(account.pairs) if account.pairs else "",
    )


def percent(value: float) -> str:
    """Write a share, without rounding anything up to 100."""
    text = f"{100 * value:.1f}"
    return "99.9 %" if text == "100.0" and value < 1 else f"{text.removesuffix('.0')} %"


def words(name: str) -> str:
    """Write a name for reading."""
    return name.replace("_", " ")


def heat(token: Token) -> str:
    """Return the token's colour as a CSS percentage, 0 where there is none."""
    return "0" if token.heat < FAINT else f"{100 * token.heat:.0f}"


def tip(trace: Trace, position: int, token: Token) -> str:
    """Say what hovering shows."""
    if token.part == "special":
        return f"token {position}: special, not evaluated"
    if token.part == "unread":
        return f"token {position}: the last one sampled, never fed to the model"
    said = f"token {position}: share {token.share:.2f}, threshold {trace.above:g}"
    return f"{said}; first match" if position == trace.first else said


def visible(token: Token) -> tuple[str, str]:
    """Return what is coloured and what follows it: a line break is shown as a sign of its own."""
    if "\n" in token.text and not token.text.strip():
        return "⏎", token.text
    return token.text, ""


def other_traces(view: RequestView) -> list[tuple[Hit, Trace]]:
    """Return the features behind a request's matches but for the one shown, each once."""
    pairs = [(hit, trace) for hit in (*view.hits, *view.shadow) for trace in hit.traces]
    first: dict[str, tuple[Hit, Trace]] = {}
    for hit, trace in pairs:
        first.setdefault(f"{hit.policy.feature_set}/{trace.feature}", (hit, trace))
    shown = view.hits[0].traces[0] if view.hits and view.hits[0].traces else None
    return [pair for pair in first.values() if pair[1] is not shown]


def segments(trace: Trace) -> Iterator[dict[str, Any]]:
    """Cut a text at its special tokens into turns; each has `role` and `tokens` with places."""
    turn: dict[str, Any] = {"role": "", "output": False, "tokens": []}
    for position, token in enumerate(trace.tokens):
        name = token.text.strip("<|>")
        if token.part == "special" and name in ("system", "user", "assistant"):
            if turn["tokens"]:
                yield turn
            turn = {"role": name, "output": False, "tokens": []}
        elif token.part != "special":
            turn["output"] |= token.part in ("output", "unread")
            turn["tokens"].append((position, token))
    if turn["tokens"]:
        yield turn
