"""The timeline of one request: its tokens, when each arrived, which were evaluated, what fired."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from demo.account import Account, RequestView, Token, Trace
from saeguard.guard.scopes import Role

WIDTH = 1000.0
"""Of the drawing; its tokens share it equally."""
TICKS = 6
"""Marks on the axis of time, at most."""


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens with the same role, or skipped for the same reason."""

    name: str
    start: int
    """First token."""
    stop: int
    """After the last token."""

    @property
    def tokens(self) -> int:
        """Return the number of tokens."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment: a token, and the seconds since the request was sent."""

    token: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Match:
    """Where a policy matched first."""

    policy: str
    shadow: bool
    token: int


@dataclass(frozen=True, slots=True)
class Lane:
    """One feature that made policies match."""

    trace: Trace
    matches: tuple[Match, ...]


@dataclass(frozen=True, slots=True)
class Timeline:
    """One streamed request."""

    view: RequestView
    roles: tuple[Span, ...]
    skipped: tuple[Span, ...]
    lanes: tuple[Lane, ...]
    ticks: tuple[Mark, ...]

    @property
    def tokens(self) -> int:
        """Return the number of tokens, prompt and output."""
        return len(self.view.tokens)

    @property
    def prompt_tokens(self) -> int:
        """Return the number of prompt tokens."""
        return len(self.view.answer.prompt_ids)

    @property
    def reasons(self) -> Mapping[str, int]:
        """Return how many tokens were skipped, by reason, as drawn."""
        return Counter(t.skipped for t in self.view.tokens if t.skipped)

    def x(self, token: float) -> float:
        """Return where a token begins."""
        return WIDTH * token / max(self.tokens, 1)

    def seconds(self, token: int) -> float | None:
        """Return when the client received an output token; None for a prompt token."""
        output = token - self.prompt_tokens
        arrived = self.view.answer.arrived
        return arrived[output] if 0 <= output < len(arrived) else None


def pick(account: Account) -> Timeline | None:
    """Return the timeline of the most severe streamed request that matched; None if there is none.

    A request in which an output token matched goes before one whose prompt did.
    """
    streamed = [
        v for v in (*account.flagged, *account.noticed) if v.answer.arrived and v.trace is not None
    ]
    in_output = (v for v in streamed if v.seen[0].first_token >= len(v.answer.prompt_ids))
    chosen = next(in_output, next(iter(streamed), None))
    return None if chosen is None else timeline(chosen)


def timeline(view: RequestView) -> Timeline:
    """Lay out one request."""
    names: list[Role | str] = [t.role for t in view.tokens]
    skipped = [span for span in spans([t.skipped for t in view.tokens]) if span.name]
    traces: dict[str, Trace] = {}
    matches: dict[str, list[Match]] = {}
    for hit in view.seen:
        for trace in hit.traces:
            name = f"{hit.policy.feature_set}/{trace.feature}"
            traces.setdefault(name, trace)
            match = Match(hit.policy.id, hit.action is None, hit.first_token)
            matches.setdefault(name, []).append(match)
    lanes = [Lane(trace, tuple(matches[name])) for name, trace in traces.items()]
    return Timeline(view, tuple(spans(names)), tuple(skipped), tuple(lanes), tuple(_ticks(view)))


def spans(names: Sequence[str]) -> Iterator[Span]:
    """Join consecutive tokens of the same name."""
    start = 0
    for name, same in groupby(names):
        stop = start + sum(1 for _ in same)
        yield Span(name, start, stop)
        start = stop


def warm(tokens: Sequence[Token], least: float) -> Iterator[tuple[int, float]]:
    """Yield token and heat of the tokens that are coloured at all."""
    for i, token in enumerate(tokens):
        if token.heat >= least:
            yield i, token.heat


def _ticks(view: RequestView) -> Iterator[Mark]:
    """Yield the first output token, some between, and the last."""
    arrived = view.answer.arrived
    if not arrived:
        return
    first = len(view.answer.prompt_ids)
    step = max(1, (len(arrived) - 1) // TICKS)
    chosen = list(range(0, len(arrived), step))
    if len(arrived) - 1 - chosen[-1] < 0.8 * step:
        chosen.pop()
    for i in dict.fromkeys((0, *chosen, len(arrived) - 1)):
        yield Mark(first + i, arrived[i])
