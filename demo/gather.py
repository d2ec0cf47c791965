"""Put answers, events, shares and Bandit's findings together, when the server has ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers.utils.logging import disable_progress_bar

from demo.account import Account, Clamped, Pair
from demo.ask import Answer
from demo.judge import judge
from demo.server import DemoError, Places, relative
from demo.views import coverage, disagreement, policy_rows, read_again, read_events, view
from saeguard.guard.watchlist import WatchList
from saeguard.hf.model import load_model
from saeguard.policy.types import Policy
from saeguard.vllm.settings import parse_settings
from saeguard.vllm.startup import load_watchlist


def gather(
    places: Places,
    answers: Sequence[Answer],
    again: Sequence[tuple[Policy, Sequence[Answer]]],
    facts: Mapping[str, str],
) -> Account:
    """Return the account of a run.

    Args:
        places: model, policies, feature sets, event log.
        answers: to the prompts.
        again: by policy that clamps, answers to some of the prompts with it enforced.
        facts: for the foot of the page.

    Raises:
        DemoError: a request lacks events.
    """
    watchlist = _watchlist(places, [policy.id for policy, _ in again])
    disable_progress_bar()
    lm = load_model(places.model)
    events = read_events(places.events)
    everything = [*answers, *(a for _, some in again for a in some)]
    missing = sum(len(events.get(a.response_id, ())) != len(watchlist.policies) for a in everything)
    if missing:
        raise DemoError(
            f"{missing} of {len(everything)} requests lack events in {relative(places.events)}: "
            f"expected {len(watchlist.policies)} for each"
        )
    seen = read_again(lm, watchlist, everything)
    views = [
        view(a, s, j, events[a.response_id], watchlist, lm.tokenizer)
        for a, s, j in zip(everything, seen, judge([a.text for a in everything]), strict=True)
    ]
    plain, rest = tuple(views[: len(answers)]), iter(views[len(answers) :])
    first = {v.answer.id: v for v in plain}
    return Account(
        views=plain,
        clamped=tuple(
            Clamped(policy, tuple(Pair(first[a.id], next(rest)) for a in some))
            for policy, some in again
        ),
        policies=policy_rows(
            (e for a in answers for e in events[a.response_id]), watchlist.policies
        ),
        coverage=coverage(answers),
        disagreement=disagreement(everything, seen, watchlist),
        facts={**facts, "watch list": watchlist.digest[:12]},
        events=places.events.name,
    )


def _watchlist(places: Places, may_enforce: Sequence[str]) -> WatchList:
    return load_watchlist(
        parse_settings(
            {
                "policies": str(places.policies),
                "feature_sets": str(places.feature_sets),
                "request_may_enforce": list(may_enforce),
            }
        )
    )
