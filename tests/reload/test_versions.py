"""Lists that have requests under way: each request is judged by the one that it began with."""

from __future__ import annotations

import gc
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from saeguard.guard.forward_pass import ForwardPass
from saeguard.guard.judge import judge_text
from saeguard.guard.prefix.store import PrefixStore
from saeguard.guard.verdict import Verdict
from saeguard.guard.watchlist import WatchList, clamps_digest
from saeguard.policy.types import Name, Selection
from saeguard.reload.versions import Version, Versions, make_version
from tests.guard.watchlists import (
    BOUND,
    FEATURES,
    coded,
    make_hook,
    make_policy,
    make_watchlist,
    random_policy,
    random_rows,
    seeded,
)

READS = {0: frozenset(range(FEATURES))}


def a_list(seed: int, number: int = 0, **more: Any) -> Version:
    """Return a list of random policies."""
    rng = seeded(seed)
    hook = make_hook(max_norm=rng.choice([math.inf, BOUND]))  # a reload may change it
    watchlist = make_watchlist([random_policy(rng, f"p{seed}.{i}") for i in range(3)], [hook])
    return make_version(number, watchlist, READS, **more)


def forward_pass(rows: dict[str, tuple[int, np.ndarray]], **more: Any) -> ForwardPass:
    """Return a pass: by request, its first position and activations."""
    counts = [len(f) for _, f in rows.values()]
    return ForwardPass(
        request_ids=list(rows),
        query_start=np.concatenate([[0], np.cumsum(counts)]),
        positions=np.concatenate([np.arange(s, s + len(f)) for s, f in rows.values()]),
        eligible=np.ones(sum(counts), bool),
        f=np.concatenate([f for _, f in rows.values()]),
        acted=None,
        ran=True,
        watchlist="",
        **{"swaps": 99, **more},
    )


def start(lists: Versions, name: str, prompt: int, keys: tuple[bytes, ...] = ()) -> Version:
    """Admit a request under the present list, and return that."""
    pin = lists.pin()
    enforced = [p.mode == "enforce" for p in pin.version.watchlist.policies]
    roles = coded(["user"] * prompt)
    pin.version.ledger.admit(name, prompt, keys, enforced=enforced, roles=roles)
    return pin.version


def plain(watchlist: WatchList, f: np.ndarray, prompt: int) -> list[Verdict]:
    """Return the verdicts of a whole text."""
    return judge_text(
        watchlist.rules,
        watchlist.shares(f),
        np.ones(len(f), bool),
        prompt,
        coded(["user"] * prompt),
        watchlist.massive(f),
    )


def same(found: list[Verdict], expected: list[Verdict]) -> bool:
    """Return whether two lists of verdicts conclude alike; averages are added up in parts."""
    return [(v.policy, v.outcome, v.first_token, v.matched_tokens) for v in found] == [
        (v.policy, v.outcome, v.first_token, v.matched_tokens) for v in expected
    ] and _scores(found) == pytest.approx(_scores(expected), rel=1e-12)


def _scores(verdicts: list[Verdict]) -> list[float]:
    return [-1.0 if v.score is None else v.score for v in verdicts]


def test_each_request_keeps_its_list() -> None:
    """Random requests and swaps: verdicts are those of one list over the whole text."""
    rng = seeded(8)
    lists = Versions(a_list(0))
    texts: dict[str, tuple[np.ndarray, int, Version]] = {}
    done: dict[str, int] = {}
    checked, most = 0, 0
    for step in range(400):
        if step % 23 == 5:
            lists.publish(a_list(step, number=step))
        if len(texts) < 6:
            f = random_rows(rng, rng.randint(4, 40))
            prompt = rng.randint(1, len(f))
            texts[f"r{step}"] = (f, prompt, start(lists, f"r{step}", prompt))
            done[f"r{step}"] = 0
        rows = {}
        for name, (f, prompt, _) in texts.items():
            n = rng.randint(1, prompt - done[name]) if done[name] < prompt else 1
            rows[name] = (done[name], f[done[name] : done[name] + n])
            done[name] += n
        seen = forward_pass(rows, swaps=step)
        lists.ingest(seen, np.diff(seen.query_start))
        most = max(most, len(lists.live))
        for name in [n for n, (f, *_) in texts.items() if done[n] == len(f)]:
            f, prompt, version = texts.pop(name)
            assert lists[name] is version
            assert same(
                lists[name].ledger.finish(name, len(f)), plain(version.watchlist, f, prompt)
            )
            checked += 1
        lists.retire()
    assert checked > 50
    assert most > 1
    assert len(lists.live) <= 3


def test_a_list_stays_for_whom_it_was_pinned() -> None:
    """A request on its way in is judged by the list that settled its cache key."""
    lists = Versions(a_list(1))
    first = lists.current
    pin = lists.pin()
    lists.publish(a_list(2, 1))
    assert lists.retire() == ()
    assert pin.version is first
    roles = coded(["user"] * 3)
    pin.version.ledger.admit("r", 3, (), enforced=[False] * 3, roles=roles)
    del pin
    gc.collect()
    assert lists.retire() == ()
    lists["r"].ledger.finish("r", 3)
    assert lists.retire() == (first,)
    assert lists.live == (lists.current,)


def test_a_request_that_never_comes_holds_nothing() -> None:
    """Its client has left before it was let in."""
    lists = Versions(a_list(1))
    pin = lists.pin()
    lists.publish(a_list(2, 1))
    assert not lists.retire()
    del pin
    gc.collect()
    assert len(lists.retire()) == 1


def test_taps_that_were_not_told_saw_nothing() -> None:
    """A pass without a list's rows is an error to its requests, and good for older ones."""
    lists = Versions(a_list(3))
    start(lists, "old", 2)
    lists.publish(a_list(4, 7))
    start(lists, "new", 2)
    f = random_rows(seeded(1), 2)
    seen = forward_pass({"old": (0, f), "new": (0, f)}, swaps=6)
    lists.ingest(seen, np.array([2, 2]))
    assert all(
        v.coverage.skipped.get("error") is None for v in lists["old"].ledger.finish("old", 2)
    )
    wrong = lists["new"].ledger.finish("new", 2, forget=False).coverage
    assert (wrong.evaluated, wrong.skipped) == (0, {"error": 2})


def test_what_another_list_saw_of_a_cached_prefix() -> None:
    """Counts where it held the rows, and is unseen where it did not."""
    prefix_store = PrefixStore(4, FEATURES + 1, blocks=8, limit_bytes=10**6)
    lists = Versions(a_list(5, prefix_store=prefix_store))
    f = random_rows(seeded(2), 8)
    keys = (b"a", b"b")
    start(lists, "first", 8, keys)
    seen = forward_pass({"first": (0, f)})
    lists.ingest(seen, np.array([8]))
    lists["first"].ledger.finish("first", 8)
    assert len(prefix_store) == 2
    for number, needs, evaluated in ((1, 0, 9), (2, 2, 1), (3, 2, 1), (4, 0, 9)):
        lists.publish(a_list(5 + number, number, prefix_store=prefix_store, needs=needs))
        name = f"r{number}"
        start(lists, name, 9, keys)
        lists.ingest(forward_pass({name: (8, f[:1])}), np.array([1]))
        covered = lists[name].ledger.finish(name, 9, forget=False).coverage
        sinks = covered.skipped.get("massive_norm", 0)
        assert covered.evaluated + sinks == evaluated, number
        if evaluated == 9:
            whole = np.concatenate([f, f[:1]])
            expected = plain(lists.current.watchlist, whole, 9)
            assert same(lists[name].ledger.finish(name, 9), expected)
        else:
            assert covered.skipped["prefix_cached"] == 8
            lists[name].ledger.finish(name, 9)


def test_an_older_list_does_not_overwrite_what_a_newer_one_saw() -> None:
    """Both compute a prefix; what the newer one saw holds more."""
    prefix_store = PrefixStore(2, 1, blocks=8, limit_bytes=10**6)
    one, two = np.full((1, 2, 1), 1.0, np.float32), np.full((1, 2, 1), 2.0, np.float32)
    eligible = np.ones((1, 2), bool)
    prefix_store.put([b"k"], two, eligible, 5)
    prefix_store.put([b"k"], one, eligible, 4)
    found = prefix_store.get(b"k", 5)
    assert found is not None
    assert found[0].tolist() == [[2.0], [2.0]]
    assert prefix_store.get(b"k", 6) is None
    assert not prefix_store.holds([b"k"], 6)
    prefix_store.put([b"k"], one, eligible, 6)
    assert prefix_store.holds([b"k"], 6)


def test_clamps_are_known_by_what_they_do() -> None:
    """Nothing to clamp has no digest."""
    policy = make_policy("p", Name("a"), {"a": Selection("f0", 0.5)})
    watchlist = make_watchlist([policy])
    assert clamps_digest(watchlist) == ""
    assert clamps_digest(replace(watchlist, digest="1")) == ""
