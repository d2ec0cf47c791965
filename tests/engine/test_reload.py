"""Policies change under a real engine, with requests under way; each verdict is its own list's."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine import test_storm
from tests.engine.reloading import BAD, GOOD, STRICTER, Reloading
from tests.engine.test_storm import SMALL_CACHE, living

pytestmark = pytest.mark.engine


def mix(seed: int, count: int = 12, tokens: int = 24, **params: Any) -> list[dict[str, Any]]:
    """Return a mix of requests that come one after the other."""
    rng = np.random.default_rng(seed)
    given = {"temperature": 0.0, "max_tokens": tokens, "ignore_eos": True, **params}
    stem = test_storm.STEMS[seed % len(test_storm.STEMS)]
    return [
        {
            "step": 2 * i,
            "prompt": [*stem[: int(rng.choice([1, 33, 80]))], *rng.integers(3, 512, 9).tolist()],
            "params": {**given, "extra_args": {"saeguard_enforce": "test.clamp"}}
            if i % 4 == 3
            else given,
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reloading]:
    """An engine on Model Runner V1 that reloads."""
    with living(tmp_path_factory.mktemp("reload"), SMALL_CACHE, Reloading) as engine:
        yield engine


def test_every_good_set_comes_into_use(live: Reloading) -> None:
    """Other thresholds, more rows, other rows, fewer: each judges what comes after it."""
    for i in (1, 2, 3, 4, 5, 0):
        digest = live.turn(i)
        live.wait(lambda s, digest=digest: s["watchlist"] == digest)  # type: ignore[misc]
        before = live.judged.get(digest, 0)
        live.serve(mix(i))
        assert live.judged[digest] == before + 12
    assert live.tally.verdicts > 6 * 12 * 4 * 0.5
    assert live.tally.seen["stopped"] + live.tally.seen["cached"] > 0
    (*_, last) = live.reloads
    assert (last["outcome"], last["new"]) == ("active", live.good[0])
    assert all(r["old"] != r["new"] for r in live.reloads if r["outcome"] == "active")


@pytest.mark.parametrize("kind", BAD)
def test_the_last_good_set_stays(kind: str, live: Reloading) -> None:
    """What is wrong is refused with the loader's own words, and nothing else changes."""
    good = live.wait(lambda s: s["waiting"] is None)["watchlist"]
    live.spoil(kind)
    said = live.wait(lambda s: not s["current"] and BAD[kind][1] in s["error"])
    assert said["watchlist"] == good
    before = live.judged.get(good, 0)
    live.serve(mix(20, 6))
    assert live.judged[good] == before + 6
    (*_, last) = live.reloads
    assert (last["outcome"], last["old"]) == ("refused", good)
    assert BAD[kind][1] in last["error"]
    back = next(i for i, digest in live.good.items() if digest == good)
    live.turn(back)
    live.wait(lambda s: s["current"])


def test_requests_under_way_keep_their_list(live: Reloading) -> None:
    """A set that comes in their middle judges those behind them, side by side in one pass."""
    first = live.turn(0)
    live.wait(lambda s: s["watchlist"] == first)
    before, counts = dict(live.judged), {}
    # The engine serves while a thread turns the link; which requests come behind the swap is the
    # engine's to say, and each is held against the list that it names. A fast machine may be done
    # before the engine looks at the link again, so each attempt serves more.
    for attempt in range(8):
        swap = threading.Thread(
            target=lambda a=attempt: (time.sleep(0.15), live.turn(2 + a % 2 * 2))
        )  # type: ignore[misc]
        swap.start()
        live.serve(mix(30 + attempt, 40 * (1 + attempt), 40))
        swap.join()
        counts = {d: n - before.get(d, 0) for d, n in live.judged.items() if n > before.get(d, 0)}
        if len(counts) > 1:
            break
        before = dict(live.judged)
    assert len(counts) > 1, counts


def test_a_cached_prefix_is_read_as_far_as_it_was_seen(live: Reloading) -> None:
    """Other rows make cached tokens unseen, which is counted; other thresholds do not."""
    first = live.turn(0)
    live.wait(lambda s: s["watchlist"] == first)
    prompt = np.random.default_rng(77).integers(3, 512, 70).tolist()
    params = {"temperature": 0.0, "max_tokens": 3, "ignore_eos": True}
    one = [{"step": 0, "prompt": prompt, "params": params}]
    live.serve(one, reset=True)
    second = live.turn(STRICTER)  # the same rows
    live.wait(lambda s: s["watchlist"] == second)
    live.serve(one)  # which checks that every token was evaluated
    assert live.cached == 64
    third = live.turn(5)  # other rows
    live.wait(lambda s: s["watchlist"] == third)
    before = live.unseen
    live.serve(one)
    assert live.cached == 64
    assert live.unseen == before + 64


def test_a_set_that_comes_back_between_two_requests(live: Reloading) -> None:
    """While no request is under way nobody tells the taps; then its clamps edit as they did."""
    prompt = np.random.default_rng(78).integers(3, 512, 40).tolist()
    plain = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True}
    clamped = {**plain, "extra_args": {"saeguard_enforce": "test.clamp"}}

    def tokens(params: dict[str, Any]) -> Any:
        one = [{"step": 0, "prompt": prompt, "params": params}]
        (ended,) = live.ask("mix", mix=one, reset=True)["ended"].values()
        return ended["tokens"]

    def take_up(i: int) -> None:
        digest = live.turn(i)
        live.wait(lambda s: s["watchlist"] == digest)
        time.sleep(0.5)  # so that the one before is let go

    take_up(0)
    edited = tokens(clamped)
    assert edited != tokens(plain)
    take_up(3)
    take_up(0)
    assert tokens(clamped) == edited


def test_nothing_is_left(live: Reloading) -> None:
    """Lists that nobody needs go, and with them their clamps."""
    digest = live.turn(3)
    live.wait(lambda s: s["watchlist"] == digest)
    live.serve(mix(50, 3))
    time.sleep(0.5)
    answer = live.ask("mix", mix=mix(51, 2))
    assert answer["lists"] == 1
    assert answer["clamps"] == 1
    assert json.loads(live.state.read_text())["current"]


def storm_of(live: Reloading, requests: int) -> None:
    """Turn the link again and again, to good sets and bad ones, while random mixes are served."""
    stop, rng = threading.Event(), np.random.default_rng(6)

    def turn() -> None:
        while not stop.wait(float(rng.uniform(0.1, 0.5))):
            if rng.random() < 0.6:
                live.turn(int(rng.integers(len(GOOD))))
            else:
                live.spoil(str(rng.choice(list(BAD))))

    turning = threading.Thread(target=turn)
    for i in GOOD:  # compiles each, so that its digest is known before it can act
        live.turn(i)
    turning.start()
    try:
        test_storm.storm(live, live.tally.requests + requests, seed=1)
    finally:
        stop.set()
        turning.join()


def test_under_load(live: Reloading) -> None:
    """Random mixes, several changes a second: each verdict is the reference's for its own list."""
    before = len(live.judged)
    storm_of(live, test_storm.MOST // 10 or 120)
    assert len(live.judged) >= max(before, 3)
    assert {r["outcome"] for r in live.reloads} >= {"active", "refused"}


def test_model_runner_v2(tmp_path: Path) -> None:
    """The runner of GPUs, through Triton's interpreter."""
    with living(tmp_path, SMALL_CACHE, Reloading, v2=True) as live:
        for i in (1, 2):
            digest = live.turn(i)
            live.wait(lambda s, digest=digest: s["watchlist"] == digest)  # type: ignore[misc]
            live.serve(mix(i, 4, 4))
            assert live.judged[digest] == 4


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize(
    "ranks", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2, "enforce_eager": False}]
)
def test_several_ranks(
    ranks: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank writes the same rows and clamps before the same pass."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(map(str, cores)))
    with living(tmp_path, {**SMALL_CACHE, **ranks}, Reloading) as live:
        for i in (1, 2, 4, 5):
            digest = live.turn(i)
            live.wait(lambda s, digest=digest: s["watchlist"] == digest)  # type: ignore[misc]
            live.serve(mix(i, 8, 12))
            assert live.judged[digest] == 8


def test_torch_compile(tmp_path: Path) -> None:
    """In vLLM's default mode, other rows and other clamps come in without another compilation."""
    with living(tmp_path, {**SMALL_CACHE, "enforce_eager": False}, Reloading) as live:
        live.serve(mix(0, 4))
        compiled = (tmp_path / "engine.log").read_text().count("torch.compile took")
        for i in (2, 4, 5, 0):
            digest = live.turn(i)
            live.wait(lambda s, digest=digest: s["watchlist"] == digest)  # type: ignore[misc]
            live.serve(mix(i, 8))
            assert live.judged[digest] == 8 + 4 * (i == 0)
        assert (tmp_path / "engine.log").read_text().count("torch.compile took") == compiled
