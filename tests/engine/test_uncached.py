"""Prompt tokens whose KV is cached and which the guard has not seen: counted, or computed again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saeguard.guard.judge import judge_text
from tests import models
from tests.engine import engines
from tests.engine.test_storm import MARGIN, Live, living

pytestmark = pytest.mark.engine

BLOCK = 32


class Forgetful(Live):
    """An engine whose guard can be made to forget, and the reference for what it then says."""

    def prepare(self, root: Path) -> dict[str, Any]:
        """Make random policies, and one that asks for what it has not seen."""
        self.guarded = models.make_guarded(root, most=7.0)
        models.write_policy(
            self.guarded.policies / "r.yaml", id="test.recompute", mode="shadow",
            uncached="recompute", detect={"a": {"feature": "f4", "above": 2.0}}, condition="a",
        )  # fmt: skip
        self.reference = engines.Reference(self.guarded.model, self.guarded.sae)
        self.unseen = 0
        """Leading tokens of each request that the guard cannot know of."""
        return self.guarded.settings(
            events=str(self.events), request_may_enforce=["test.recompute"]
        )

    def shares(self, tokens: list[int], ended: dict[str, Any]) -> np.ndarray:
        """Return the reference's [tokens, features]; nothing is clamped here."""
        return super().shares(tokens, {**ended, "enforced": None})  # type: ignore[return-value]

    def check(self, ended: dict[str, Any], events: dict[str, Any]) -> None:
        """Hold one request against the reference, which is not shown what is unseen either."""
        if not self.unseen or ended["enforced"]:
            super().check(ended, events)
            return
        tokens = ended["tokens"][:-1]
        at = np.arange(len(tokens))
        evaluable = ~np.isin(tokens, self.watchlist.exclude_tokens) & (at >= self.unseen)
        shares = self.shares(tokens, ended)
        for verdict in judge_text(self.watchlist.rules, shares, evaluable, ended["prompt"]):
            event = events[verdict.policy]
            cached = event["coverage"]["skipped"].get("prefix_cached", 0)
            scope = next(p.scope for p in self.watchlist.policies if p.id == verdict.policy)
            assert cached == (0 if scope == "output" else self.unseen)
            if verdict.score is None or abs(verdict.score - 1) > MARGIN:
                assert (event["verdict"], event["first_token"]) == (
                    verdict.outcome, verdict.first_token
                ), (verdict, event)  # fmt: skip
                self.tally.verdicts += 1


class Connected(Forgetful):
    """An engine that writes KV to disk through a connector, and reads it from there."""

    def __init__(self, root: Path, engine: dict[str, Any], *, v2: bool = False) -> None:
        """Start the engine."""
        connector = {
            "kv_connector": "ExampleConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": str(root / "kv")},
        }
        # It keeps what the first chunk of a prompt left, so a chunk must take a whole prompt.
        more = {"kv_transfer_config": connector, "max_num_batched_tokens": 192}
        super().__init__(root, {**engine, **more}, v2=v2)


@pytest.fixture(
    scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["v1", "v2"]
)
def connected(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Connected]:
    """Start an engine whose KV outlives its cache."""
    root = tmp_path_factory.mktemp("connected")
    with living(root, {"block_size": BLOCK}, Connected, v2=request.param) as live:
        yield live


@pytest.fixture(
    scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["v1", "v2"]
)
def forgetful(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Forgetful]:
    """Start an engine with a cache that holds all of a test."""
    root = tmp_path_factory.mktemp("uncached")
    with living(root, {"block_size": BLOCK}, Forgetful, v2=request.param) as live:
        yield live


def requests(seed: int, **params: Any) -> list[dict[str, Any]]:
    """Return requests that share their first three blocks."""
    rng = np.random.default_rng(seed)
    stem = [1, *rng.integers(3, 512, 3 * BLOCK - 1).tolist()]
    return [
        {
            "step": 0,
            "prompt": [*stem, *rng.integers(3, 512, 5).tolist()],
            "params": {**engines.GREEDY, **params},
        }
        for _ in range(3)
    ]


def test_count(forgetful: Forgetful) -> None:
    """What is not seen is told, policy by policy, and is no ground for a verdict."""
    mix = requests(1)
    forgetful.serve(mix[:1])
    forgetful.ask("forget")
    forgetful.unseen = 3 * BLOCK
    before = forgetful.tally.verdicts
    try:
        forgetful.serve(mix[1:])
    finally:
        forgetful.unseen = 0
    assert forgetful.cached == 3 * BLOCK
    assert forgetful.tally.verdicts - before > len(forgetful.watchlist.policies)


def test_recompute(forgetful: Forgetful) -> None:
    """The prompt is computed again, and from then on is known to whoever reads it."""
    asking = requests(2, extra_args={"saeguard_enforce": "test.recompute"})
    forgetful.serve(asking[:1])
    forgetful.ask("forget")
    forgetful.serve(asking[1:2])  # every token is evaluated, or `check` fails
    assert forgetful.cached == 0
    forgetful.serve(asking[2:])
    assert forgetful.cached == 3 * BLOCK
    forgetful.serve(requests(2)[2:])  # nobody who does not ask computes anything again
    assert forgetful.cached == 3 * BLOCK


def test_kv_through_a_connector_is_counted(connected: Connected) -> None:
    """As after a restart: KV comes from disk, and the guard has no record of it."""
    mix = requests(3)
    connected.serve(mix[:1])
    connected.unseen = 3 * BLOCK
    try:
        connected.serve(mix[1:2], reset=True)
    finally:
        connected.unseen = 0
    assert connected.cached == 3 * BLOCK


def test_kv_through_a_connector_is_computed_again(connected: Connected) -> None:
    """If a policy asks for it; later requests read it from the cache, with its record."""
    asking = requests(4, extra_args={"saeguard_enforce": "test.recompute"})
    connected.serve(asking[:1])
    connected.serve(asking[1:2], reset=True)  # every token is evaluated, or `check` fails
    assert connected.cached == 0
    connected.serve(asking[2:])
    assert connected.cached == 3 * BLOCK
