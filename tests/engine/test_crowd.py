"""Many requests at once: each verdict belongs to its own, and watching changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import models
from tests.engine import engines
from tests.engine.test_parity import check_verdicts

pytestmark = pytest.mark.engine

REQUESTS = 240
ALONE = 24
"""Of the requests, how many are served again with nobody beside them."""


@dataclass(frozen=True)
class Crowd:
    """The same requests served with and without the guard."""

    guarded: models.Guarded
    settings: dict[str, object]
    watched: engines.Served
    plain: engines.Served


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Crowd:
    """Serve the crowd twice, in vLLM's default mode, 32 at a time."""
    root = tmp_path_factory.mktemp("crowd")
    guarded = models.make_guarded(root, "llama")
    settings = guarded.settings(events=str(root / "events.jsonl"))
    engine = {"model": str(guarded.model), "max_num_seqs": 32, "max_num_batched_tokens": 512}
    long = engines.requests(engines.random_prompts(1, seed=6, shortest=200, longest=201))
    crowd = engines.requests(engines.random_prompts(REQUESTS, seed=5))
    alone = engines.requests([r["prompt"] for r in crowd[:ALONE]], skip_reading_prefix_cache=True)
    batches = [crowd, *([request] for request in alone), long, long]
    watched = engines.serve(
        root / "watched", {**engine, "additional_config": {"saeguard": settings}}, batches
    )
    return Crowd(guarded, settings, watched, engines.serve(root / "plain", engine, batches))


def test_every_event_is_that_of_its_own_request(crowd: Crowd) -> None:
    """Of 240 concurrent requests of random lengths, each event equals the reference's."""
    events = engines.events_by_request(Path(str(crowd.settings["events"])))
    assert len(events) == REQUESTS + ALONE + 2
    checked = check_verdicts(crowd.watched, crowd.guarded, crowd.settings)
    assert checked > 0.97 * REQUESTS * 6
    assert crowd.watched.left == 0


def test_a_full_batch_does_not_show(crowd: Crowd) -> None:
    """The same text alone and among 31 others: the same verdict, and the score within rounding."""
    events = engines.events_by_request(Path(str(crowd.settings["events"])))
    ids = [r["id"] for r in crowd.watched.results]
    widest = 0.0
    for beside, alone in zip(ids[:ALONE], ids[REQUESTS : REQUESTS + ALONE], strict=True):
        for policy, event in events[beside].items():
            other = events[alone][policy]
            for what in ("verdict", "first_token", "matched_tokens", "coverage", "acted"):
                assert event[what] == other[what]
            if event["score"] is not None:
                gap = abs(event["score"] - other["score"]) / max(1.0, abs(event["score"]))
                widest = max(widest, gap)
    print(f"alone or among {REQUESTS}: largest relative difference of a score {widest:.1e}")
    assert widest < 1e-4


def test_a_cached_prompt_is_not_blind(crowd: Crowd) -> None:
    """A prompt read from the prefix cache gets the very verdict it got when it was computed."""
    first, second = crowd.watched.results[-2:]
    assert (first["cached"], second["cached"] > 0) == (0, True)
    assert second["saeguard"]["coverage"]["skipped"] == {"special_token": 1, "not_forwarded": 1}
    assert second["saeguard"] == first["saeguard"]


def test_watching_does_not_change_a_token(crowd: Crowd) -> None:
    """Greedy output under policies that log and flag is the unguarded server's, token for token."""
    watched = [r["output"] for r in crowd.watched.results]
    assert watched == [r["output"] for r in crowd.plain.results]
    assert len({tuple(o) for o in watched}) > REQUESTS / 2, "outputs must differ to prove anything"


def test_an_unconfigured_plugin_is_idle(crowd: Crowd) -> None:
    """With the plugin installed and no configuration there is no verdict and no guard."""
    assert all(r["saeguard"] is None for r in crowd.plain.results)
    assert "saeguard taps installed" not in crowd.plain.log
    assert "saeguard taps installed" in crowd.watched.log
