"""Put answers, events and activations together, request by request."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from demo.account import OUTCOMES, SEVERITIES, Hit, PolicyRow, RequestView, Skipped, Token, Trace
from demo.ask import Answer
from demo.judge import Judgement
from saeguard.guard.roles.assign import RoleMarks, roles_of
from saeguard.guard.roles.chat_template import role_marks_of
from saeguard.guard.scopes import OUTPUT, ROLES, TEMPLATE, Role
from saeguard.guard.watchlist import WatchList
from saeguard.hf.model import LanguageModel
from saeguard.hf.scan import Seen, see
from saeguard.hf.texts import Text
from saeguard.policy.types import Over, Policy


def read_again(lm: LanguageModel, watchlist: WatchList, answers: Sequence[Answer]) -> list[Seen]:
    """Return what Transformers finds at each token of the answers, prompts included.

    It depends on the text alone: clamps write behind the point that is read here.
    """
    texts = [Text(a.id, (*a.prompt_ids, *a.token_ids), len(a.prompt_ids)) for a in answers]
    found = {seen.text: seen for seen in see(lm, watchlist, texts)}
    return [found[i] for i in range(len(answers))]


def spell(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text of each token; if a character spans tokens, the last one has it."""
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


def tokens_of(answer: Answer, seen: Seen, tokenizer: Any) -> tuple[Token, ...]:
    """Return the tokens of prompt and output with role, and the reason if one was skipped."""
    ids = (*answer.prompt_ids, *answer.token_ids)
    parts = zip(
        spell(tokenizer, ids), _roles(answer, tokenizer), _skipped(answer, seen), strict=True
    )
    return tuple(Token(text, 0.0, role, why) for text, role, why in parts)


def view(
    answer: Answer,
    seen: Seen,
    judgement: Judgement,
    events: Iterable[Mapping[str, Any]],
    watchlist: WatchList,
    tokenizer: Any,
) -> RequestView:
    """Put one request's answer, verdicts and activations together.

    Args:
        answer: what came back.
        seen: what Transformers finds in its text.
        judgement: of its code.
        events: those of this request.
        watchlist: for the policies and their features.
        tokenizer: the model's.
    """
    tokens = tokens_of(answer, seen, tokenizer)
    hits = []
    for event in events:
        if event["verdict"] != "match":
            continue
        policy = next(p for p in watchlist.policies if (p.id, p.digest) == _key(event))
        traces = tuple(_traces(policy, event, seen.shares, watchlist, tokens))
        hits.append(
            Hit(
                policy=policy,
                action=event["acted"],
                score=event["score"],
                first_token=event["first_token"],
                matched_tokens=event["matched_tokens"],
                traces=traces,
            )
        )
    hits.sort(key=lambda h: (SEVERITIES.index(h.policy.severity), -h.score))
    return RequestView(
        answer=answer,
        hits=tuple(h for h in hits if h.action is not None),
        shadow=tuple(h for h in hits if h.action is None),
        judgement=judgement,
        tokens=tokens,
    )


def disagreement(answers: Sequence[Answer], seen: Sequence[Seen], watchlist: WatchList) -> float:
    """Return the largest distance between served and recomputed shares of single tokens.

    Policies that compare a mean, or the like, report that; they are left out.
    """
    worst = 0.0
    by_token = {
        (p.id, s.feature)
        for p in watchlist.policies
        for s in p.detect.values()
        if all(t.over == Over() for t in p.detect.values() if t.feature == s.feature)
    }
    sets = {p.id: p.feature_set for p in watchlist.policies}
    for answer, text in zip(answers, seen, strict=True):
        for verdict in answer.said["verdicts"]:
            for name, fired in verdict["features"].items():
                if (verdict["policy"], name) not in by_token:
                    continue
                column = watchlist.features.index(f"{sets[verdict['policy']]}/{name}")
                worst = max(worst, abs(float(text.shares[fired["at"], column]) - fired["max"]))
    return worst


def coverage(answers: Iterable[Answer]) -> dict[str, Any]:
    """Add up how many tokens were evaluated, by the responses."""
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
    """Count verdicts by policy, most severe policies first."""
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
    """Return the verdict events by the id of the response that they belong to.

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


def _roles(answer: Answer, tokenizer: Any) -> list[Role]:
    marks = role_marks_of(tokenizer)
    ids = np.array(answer.prompt_ids)
    roles = roles_of(marks, ids) if isinstance(marks, RoleMarks) else np.full(len(ids), TEMPLATE)
    return [ROLES[role] for role in (*roles, *[OUTPUT] * len(answer.token_ids))]


def _skipped(answer: Answer, seen: Seen) -> list[Skipped]:
    """Return why each token was skipped; the last one sampled never went into the model."""
    reasons: list[Skipped] = [
        "special_token" if not ok else "massive_norm" if massive else ""
        for ok, massive in zip(seen.evaluable, seen.massive, strict=True)
    ]
    if answer.token_ids:
        reasons[-1] = "not_forwarded"
    return reasons


def _traces(
    policy: Policy,
    event: Mapping[str, Any],
    shares: np.ndarray,
    watchlist: WatchList,
    tokens: Sequence[Token],
) -> Iterator[Trace]:
    """Yield the features that were above their threshold, the clearest first."""
    fired = [
        (event["features"][s.feature]["max"] / s.above, s)
        for s in policy.detect.values()
        if s.feature in event["features"] and event["features"][s.feature]["max"] > s.above
    ]
    done: set[str] = set()
    for _, selection in sorted(fired, key=lambda pair: -pair[0]):
        if selection.feature in done:
            continue
        done.add(selection.feature)
        column = watchlist.features.index(f"{policy.feature_set}/{selection.feature}")
        coloured = tuple(
            Token(t.text, float(share), t.role, t.skipped)
            for t, share in zip(tokens, shares[:, column], strict=True)
        )
        yield Trace(
            selection.feature,
            selection.above,
            coloured,
            event["first_token"],
            policy.scope,
            by_token=selection.over == Over(),
        )
