"""Explain a verdict in words: tokens evaluated, selections that held, distance to a match."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from saeguard.guard.verdict import THRESHOLD
from saeguard.policy.types import Over, Policy, Window
from saeguard.policy_tools.explanation import Explanation
from saeguard.policy_tools.nearest import around, explained_position

AROUND = 16
"""Tokens of text shown on each side of the one explained."""
SHOWN = 12
"""Runs of positions that a line names at most."""


def in_words(
    found: Explanation, pieces: Sequence[str] | None, written: Mapping[str, str]
) -> list[str]:
    """Return lines that explain a verdict to a reader who knows the policy's purpose.

    Args:
        found: what the verdict was reached from.
        pieces: the text of each token, None if it was not recorded.
        written: the policy's `condition` and `for` as they stand in its file.
    """
    policy, tokens = found.policy, len(found.looked)
    text = f"{tokens} tokens, {found.prompt_tokens} of them the prompt"
    lines = [
        *_heading(policy),
        "",
        _verdict(found),
        "",
        f"The text has {text}. {_looked(found)}",
    ]
    lines += ["", *_selections(found), "", *_condition(found, written)]
    at = explained_position(found)
    if at is not None:
        lines += ["", *_near(found, at, pieces)]
    if pieces is not None and at is not None:
        lines += ["", *_excerpt(found, at, pieces)]
    return lines


def _heading(policy: Policy) -> Iterator[str]:
    does = {
        "log": "logs the request",
        "flag": "flags the request",
        "clamp": f"clamps {', '.join(policy.clamp.features) if policy.clamp else ''}",
        "stop": "stops the request",
    }[policy.action]
    would = "" if policy.mode == "enforce" else ", in shadow: it only reports what it would do"
    yield f"{policy.id}: {policy.title}"
    yield f"  {policy.severity} severity, {does}{would}; owner {policy.owner}"


def _verdict(found: Explanation) -> str:
    v = found.verdict
    score = "" if v.score is None else f" The score is {v.score:.2f}; above 1 it matches."
    match v.outcome:
        case "match":
            on = positions(found.on)
            return f"MATCH, first at token {v.first_token}. It is on at {on}.{score}"
        case "no_match":
            near = f" It came {v.score:.0%} of the way." if v.score and v.score > 0 else ""
            return f"NO MATCH.{near}{score}"
        case "error":
            return f"ERROR: {v.error}. Tokens whose activations are not finite cannot be judged."
        case _:
            if not v.coverage.tokens:
                return "NOT EVALUATED: the text has no token in the policy's scope."
            return "NOT EVALUATED: no token of its scope could be looked at."


def _looked(found: Explanation) -> str:
    scope = {
        "prompt": "the prompt",
        "output": "the output",
        "both": "prompt and output",
        "assistant": "the assistant's messages, the output among them",
        "user": "the user's messages",
        "system": "the system's messages",
        "tool": "the messages of tools",
    }
    c = found.verdict.coverage
    left = ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in c.skipped.items())
    said = f"The policy looks at {scope[found.policy.scope]}: {_count(c.tokens)}"
    return f"{said}, {c.evaluated} evaluated" + (f" (not: {left})." if left else ".")


def _selections(found: Explanation) -> Iterator[str]:
    rows = [("selection", "feature", "holds above", "highest", "at token", "holds at")]
    for name, selection in found.policy.detect.items():
        value = np.where(found.looked, found.values[name], -np.inf)
        top = int(value.argmax()) if found.looked.any() else None
        held = value > selection.above
        rows.append(
            (
                name,
                selection.feature + _over(selection.over),
                f"{selection.above:g}",
                "-" if top is None else f"{value[top]:.3g}",
                "-" if top is None else str(top),
                positions(held),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()


def _condition(found: Explanation, written: Mapping[str, str]) -> Iterator[str]:
    condition = " ".join(written["condition"].split())
    holds = found.evidence > THRESHOLD
    yield f"Condition: {condition}. It holds at {positions(holds)}."
    if found.policy.window != Window():
        yield f"Window: {written['for']}. It is full at {positions(found.match)}."


def _near(found: Explanation, at: int, pieces: Sequence[str] | None) -> Iterator[str]:
    spelt = "" if pieces is None else f" {pieces[at]!r}"
    first = "It first matches" if found.match.any() else "It comes nearest"
    yield f"{first} at token {at}{spelt}:"
    yield from (f"  {line}" for line in around(found, at))


def _excerpt(found: Explanation, at: int, pieces: Sequence[str]) -> Iterator[str]:
    start, end = max(0, at - AROUND), min(len(pieces), at + AROUND + 1)
    holds = found.evidence > THRESHOLD
    if not holds.any():
        holds = np.arange(len(pieces)) == at
    shown = "".join(f">>{pieces[i]}<<" if holds[i] else pieces[i] for i in range(start, end))
    shown = shown.replace("<<>>", "")
    mark = "holds" if (found.evidence > THRESHOLD).any() else "comes nearest"
    yield f"Tokens {start} to {end - 1}, >>marked<< where the condition {mark}:"
    before, after = ("... " if start else ""), (" ..." if end < len(pieces) else "")
    yield from (f"  | {line}" for line in f"{before}{_visible(shown)}{after}".split("\n"))


def positions(mask: np.ndarray) -> str:
    """Return the true positions in words: `no token`, `token 4`, `3 tokens: 4, 8-9`."""
    at = np.flatnonzero(mask)
    if not len(at):
        return "no token"
    edges = np.flatnonzero(np.diff(at) > 1) + 1
    runs = [(int(run[0]), int(run[-1])) for run in np.split(at, edges)]
    names = [f"{a}" if a == b else f"{a}-{b}" for a, b in runs[:SHOWN]]
    more = ", ..." if len(runs) > SHOWN else ""
    if len(at) == 1:
        return f"token {names[0]}"
    return f"{len(at)} tokens: {', '.join(names)}{more}"


def _over(over: Over) -> str:
    words = {
        "mean": f", mean of {over.n}",
        "max": f", max of {over.n}",
        "average": f", average with half-life {over.n}",
        "peak": ", max so far",
    }
    return words.get(over.kind, "")


def _count(n: int) -> str:
    return "1 token" if n == 1 else f"{n} tokens"


def _visible(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
