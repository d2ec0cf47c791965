"""What happened, as plain records: the terminal and the HTML page both read these."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from demo.ask import Answer
from demo.judge import Judgement
from saeguard.guard.watchlist import WatchList
from saeguard.hf.model import LanguageModel
from saeguard.hf.residuals import record
from saeguard.hf.scan import activations
from saeguard.policy.types import Policy

Part = Literal["prompt", "output", "special", "unread"]
OUTCOMES = ("match", "no_match", "error", "not_evaluated")
SEVERITIES = ("critical", "high", "medium", "low")


@dataclass(frozen=True, slots=True)
class Token:
    """One token's text and how strongly a feature is active at it."""

    text: str
    share: float
    """Of the feature's calibrated range; meaningless where `part` is special or unread."""
    part: Part

    @property
    def heat(self) -> float:
        """The share as a colour: 0 to 1, and 0 for tokens that the guard does not read."""
        if self.part in ("special", "unread") or not np.isfinite(self.share):
            return 0.0
        return float(min(max(self.share, 0.0), 1.0))


@dataclass(frozen=True, slots=True)
class Trace:
    """One feature along one text."""

    feature: str
    above: float
    """The policy's threshold."""
    tokens: tuple[Token, ...]
    first: int | None
    """Where the policy first matched."""


@dataclass(frozen=True, slots=True)
class Hit:
    """A policy that matched, and the features that made it match, strongest first."""

    policy: Policy
    action: str | None
    """What was done; None in shadow."""
    score: float
    first_token: int
    matched_tokens: int
    traces: tuple[Trace, ...]


@dataclass(frozen=True, slots=True)
class RequestView:
    """One request as it is shown."""

    answer: Answer
    hits: tuple[Hit, ...]
    """Policies that acted, gravest first."""
    shadow: tuple[Hit, ...]
    """Policies that would have acted, were they enforced."""
    judgement: Judgement
    seconds: float

    @property
    def flagged(self) -> bool:
        """What the application sees."""
        return bool(self.answer.said["flagged"])

    @property
    def visible(self) -> list[Hit]:
        """Of the policies that acted, those that the application is told of."""
        return [hit for hit in self.hits if hit.action != "log"]


@dataclass(frozen=True, slots=True)
class PolicyRow:
    """One policy's verdicts over all requests, from the event log."""

    policy: Policy
    verdicts: Mapping[str, int]
    acted: int


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt without and with the clamp."""

    off: RequestView
    on: RequestView

    @property
    def telling(self) -> bool:
        """Whether Bandit objects without the clamp: there was something to prevent."""
        return bool(self.off.judgement.findings)


@dataclass(frozen=True, slots=True)
class Account:
    """Everything the report tells."""

    views: tuple[RequestView, ...]
    pairs: tuple[Pair, ...]
    clamp: Policy | None
    policies: tuple[PolicyRow, ...]
    coverage: Mapping[str, Any]
    """`tokens`, `evaluated`, `skipped` by reason, over all requests."""
    disagreement: float
    """Largest distance between a share the server told and the one computed afterwards."""
    facts: Mapping[str, str] = field(default_factory=dict)
    events: str = "events.jsonl"

    @property
    def flagged(self) -> list[RequestView]:
        """Flagged requests, gravest first."""
        return sorted((v for v in self.views if v.flagged), key=_gravity)

    @property
    def quiet(self) -> list[RequestView]:
        """The others."""
        return [v for v in self.views if not v.flagged]

    @property
    def groups(self) -> list[tuple[str, int, int, int]]:
        """Per kind of prompt: its name, requests, flagged by its own policies, flagged by any."""
        rows = []
        for name in dict.fromkeys(v.answer.behaviour for v in self.views):
            mine = [v for v in self.views if v.answer.behaviour == name]
            family = name.replace("_", "-") + "."
            own = sum(any(h.policy.id.startswith(family) for h in v.visible) for v in mine)
            rows.append((name.replace("_", " "), len(mine), own, sum(v.flagged for v in mine)))
        return rows

    @property
    def shown_pair(self) -> Pair | None:
        """The first pair where there was something to prevent, else the first."""
        return next((p for p in self.pairs if p.telling), self.pairs[0] if self.pairs else None)


def read_shares(
    lm: LanguageModel, watchlist: WatchList, answers: Sequence[Answer]
) -> list[np.ndarray]:
    """Return each answer's feature shares [tokens, features], prompt included.

    They depend on the text alone: clamps write behind the point that is read here.
    """
    texts = [(*a.prompt_ids, *a.token_ids) for a in answers]
    found = {
        i: watchlist.shares(activations(watchlist, residuals))
        for i, residuals in record(lm, texts, [hook.layer for hook in watchlist.hooks])
    }
    return [found[i] for i in range(len(answers))]


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text of each token; where a character spans tokens, the last one has it."""
    out, waiting = [], []
    for token in ids:
        waiting.append(token)
        text = tokenizer.decode(waiting, skip_special_tokens=False)
        whole = not text.endswith("\N{REPLACEMENT CHARACTER}")
        out.append(text if whole else "")
        waiting = [] if whole else waiting
    if waiting:
        out[-1] = tokenizer.decode(waiting, skip_special_tokens=False)
    return out


def view(
    answer: Answer,
    shares: np.ndarray,
    judgement: Judgement,
    events: Iterable[Mapping[str, Any]],
    watchlist: WatchList,
    tokenizer: Any,
) -> RequestView:
    """Put one request's answer, verdicts and shares together.

    Args:
        answer: what came back.
        shares: [tokens, features] of its text.
        judgement: of its code.
        events: those of this request.
        watchlist: for the policies and where their features are.
        tokenizer: the model's.
    """
    texts = pieces(tokenizer, (*answer.prompt_ids, *answer.token_ids))
    parts = _parts(answer, watchlist.exclude_tokens)
    hits = []
    for event in events:
        if event["verdict"] != "match":
            continue
        policy = next(p for p in watchlist.policies if (p.id, p.digest) == _key(event))
        hits.append(
            Hit(
                policy=policy,
                action=event["acted"],
                score=event["score"],
                first_token=event["first_token"],
                matched_tokens=event["matched_tokens"],
                traces=_traces(policy, event, shares, watchlist, texts, parts),
            )
        )
    hits.sort(key=lambda h: (SEVERITIES.index(h.policy.severity), -h.score))
    return RequestView(
        answer=answer,
        hits=tuple(h for h in hits if h.action is not None),
        shadow=tuple(h for h in hits if h.action is None),
        judgement=judgement,
        seconds=answer.seconds,
    )


def disagreement(
    answers: Sequence[Answer], shares: Sequence[np.ndarray], watchlist: WatchList
) -> float:
    """Return the largest distance between served and recomputed shares, at the tokens told."""
    worst = 0.0
    sets = {p.id: p.feature_set for p in watchlist.policies}
    for answer, computed in zip(answers, shares, strict=True):
        for verdict in answer.said["verdicts"]:
            for name, fired in verdict["features"].items():
                column = watchlist.features.index(f"{sets[verdict['policy']]}/{name}")
                worst = max(worst, abs(float(computed[fired["at"], column]) - fired["max"]))
    return worst


def coverage(answers: Iterable[Answer]) -> dict[str, Any]:
    """Add up what the responses say of how many tokens were evaluated."""
    tokens = evaluated = 0
    skipped: Counter[str] = Counter()
    for answer in answers:
        said = answer.said["coverage"]
        tokens += said["tokens"]
        evaluated += said["evaluated"]
        skipped.update(said["skipped"])
    return {"tokens": tokens, "evaluated": evaluated, "skipped": dict(skipped)}


def policy_rows(
    events: Iterable[Mapping[str, Any]], policies: Sequence[Policy]
) -> tuple[PolicyRow, ...]:
    """Count verdicts by policy, gravest policies first."""
    verdicts: dict[tuple[str, str], Counter[str]] = {(p.id, p.digest): Counter() for p in policies}
    acted: Counter[tuple[str, str]] = Counter()
    for event in events:
        verdicts[_key(event)][event["verdict"]] += 1
        acted[_key(event)] += event["acted"] is not None
    rows = [
        PolicyRow(p, {o: verdicts[p.id, p.digest][o] for o in OUTCOMES}, acted[p.id, p.digest])
        for p in policies
    ]
    return tuple(sorted(rows, key=lambda r: (SEVERITIES.index(r.policy.severity), r.policy.id)))


def read_events(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the verdict events by the id of the response they belong to.

    Within the engine a request's id carries a random suffix.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event["event"] == "verdict":
            found.setdefault(event["request_id"].rsplit("-", 1)[0], []).append(event)
    return found


def _key(event: Mapping[str, Any]) -> tuple[str, str]:
    return event["policy"], event["policy_digest"]


def _gravity(v: RequestView) -> tuple[int, float]:
    return min(((SEVERITIES.index(h.policy.severity), -h.score) for h in v.hits), default=(9, 0.0))


def _parts(answer: Answer, excluded: Sequence[int]) -> list[Part]:
    """Say of each token whether the guard read it; the last one never went into the model."""
    parts: list[Part] = ["prompt"] * len(answer.prompt_ids) + ["output"] * len(answer.token_ids)
    for i, token in enumerate((*answer.prompt_ids, *answer.token_ids)):
        if token in excluded:
            parts[i] = "special"
    if parts and parts[-1] == "output":
        parts[-1] = "unread"
    return parts


def _traces(
    policy: Policy,
    event: Mapping[str, Any],
    shares: np.ndarray,
    watchlist: WatchList,
    texts: Sequence[str],
    parts: Sequence[Part],
) -> tuple[Trace, ...]:
    """Return the features that were above their threshold, the clearest first."""
    found: dict[str, tuple[float, Trace]] = {}
    for selection in policy.detect.values():
        fired = event["features"].get(selection.feature)
        if fired is None or fired["max"] <= selection.above:
            continue
        column = watchlist.features.index(f"{policy.feature_set}/{selection.feature}")
        tokens = tuple(
            Token(text, float(share), part)
            for text, share, part in zip(texts, shares[:, column], parts, strict=True)
        )
        trace = Trace(selection.feature, selection.above, tokens, event["first_token"])
        strength = fired["max"] / selection.above
        if strength > found.get(selection.feature, (0.0,))[0]:
            found[selection.feature] = (strength, trace)
    return tuple(trace for _, trace in sorted(found.values(), key=lambda pair: -pair[0]))
