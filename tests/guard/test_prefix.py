"""What was seen of a block is found again under its key, exactly, within bounds."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saeguard.guard.judge import judge_text
from saeguard.guard.ledger import Ledger
from saeguard.guard.prefix.store import PrefixStore
from saeguard.guard.verdict import balanced
from tests.guard.test_judge import assert_same, said
from tests.guard.test_ledger import Text, forward_pass
from tests.guard.watchlists import (
    BOUND,
    FEATURES,
    coded,
    make_hook,
    make_watchlist,
    random_policy,
    random_roles,
    random_rows,
    seeded,
)

BLOCK = 4


def prefix_store(**more: int) -> PrefixStore:
    """Return a memory with room for everything, unless told otherwise."""
    return PrefixStore(BLOCK, FEATURES + 1, **{"blocks": 1000, "limit_bytes": 2**30, **more})


def block(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return one block of activations, most of them zero, and which of its tokens are watched."""
    rng = np.random.default_rng(seed)
    shape = (1, BLOCK, FEATURES + 1)
    f = rng.normal(size=shape) * (rng.random(shape) < 0.3)
    return f.astype(np.float32), rng.random((1, BLOCK)) < 0.8


def test_a_block_comes_back_exactly() -> None:
    """Bit for bit, values that are no numbers among them."""
    kept = prefix_store()
    f, eligible = block(0)
    f[0, 1, 2], f[0, 3, 0] = np.nan, np.inf
    kept.put([b"k"], f, eligible)

    found = kept.get(b"k")

    assert found is not None
    np.testing.assert_array_equal(found[0], f[0])
    np.testing.assert_array_equal(found[1], eligible[0])
    assert kept.get(b"other") is None


def test_what_left_the_cache_makes_room() -> None:
    """Twice as many entries as the cache has blocks, at most, and none that it still has goes."""
    cached = {bytes([i]) for i in range(0, 200, 20)}
    kept = PrefixStore(
        BLOCK, FEATURES + 1, blocks=10, limit_bytes=2**30, in_cache=cached.__contains__
    )
    for i in range(200):
        kept.put([bytes([i])], *block(i))

    assert len(kept) <= 21
    assert kept.holds(sorted(cached))
    assert kept.dropped == 0


def test_bytes_are_bounded_and_what_goes_is_counted() -> None:
    """The oldest go first; the sum of what is held is right."""
    kept = prefix_store(limit_bytes=20_000)
    for i in range(200):
        kept.put([bytes([i])], *block(i))

    assert kept.nbytes <= 20_000
    assert len(kept) + kept.dropped == 200
    assert kept.holds([bytes([199])])
    assert not kept.holds([bytes([0])])
    kept.clear()
    assert (len(kept), kept.nbytes) == (0, 0)


class Engine:
    """Serves texts in passes, with a prefix cache of whole blocks; keys hash all before them."""

    def __init__(self, seed: int) -> None:
        """Make policies and texts that share prefixes."""
        self.rng = seeded(seed)
        self.policies = [random_policy(self.rng, f"p{i}") for i in range(4)]
        self.watchlist = make_watchlist(self.policies, [make_hook(max_norm=BOUND)])
        self.ledger = Ledger(self.watchlist, slots=2, prefix_store=prefix_store())
        self.cached: set[bytes] = set()
        self.hits = 0
        stems = [random_rows(self.rng, 24) for _ in range(2)]
        special = [np.array([self.rng.random() < 0.1 for _ in range(24)]) for _ in stems]
        self.texts = [self._text(i, stems, special) for i in range(8)]

    def _text(self, i: int, stems: list[np.ndarray], special: list[np.ndarray]) -> Text:
        which = self.rng.randrange(len(stems))
        shared, own = self.rng.randint(0, 24), self.rng.randint(2, 12)
        f = np.concatenate([stems[which][:shared], random_rows(self.rng, own)])
        excluded = np.concatenate([special[which][:shared], np.zeros(own, bool)])
        prompt = self.rng.randint(1, len(f) - 1)
        return Text(f"r{i}", f, excluded, prompt, random_roles(self.rng, prompt), known=prompt)

    def keys(self, text: Text) -> list[bytes]:
        """Return the key of each whole block of what is known of a text."""
        return [
            hashlib.sha256(text.f[:end].tobytes() + text.excluded[:end].tobytes()).digest()
            for end in range(BLOCK, text.known + 1, BLOCK)
        ]

    def serve(self) -> None:
        """Serve all texts, several at once; some are preempted, and come back by the cache."""
        waiting, running = list(self.texts), []
        keys: dict[str, list[bytes]] = {text.name: [] for text in self.texts}
        for text in waiting:
            self.ledger.admit(text.name, text.prompt, keys=keys[text.name], roles=coded(text.roles))
        while waiting or running:
            entering = set()
            while waiting and (not running or self.rng.random() < 0.5):
                text = waiting.pop(self.rng.randrange(len(waiting)))
                text.computed = self._hit(text)
                running.append(text)
                entering.add(text.name)
            rows, counted = [], []
            for text in running:
                n = self.rng.randint(1, text.known - text.computed)
                rows.append((text, text.computed, text.f[text.computed : text.computed + n]))
                counted.append(n)
                text.computed += n
                if text.computed == text.known and not text.done:
                    text.known += 1
                keys[text.name][:] = self.keys(text)
                # The engine knows a block's key as soon as it is to be computed: a request that
                # comes in the same step can read it.
                self.cached |= set(keys[text.name][: text.computed // BLOCK])
            order = self.rng.sample(range(len(rows)), len(rows))
            self.ledger.ingest(
                forward_pass([rows[i] for i in order]),
                np.array([counted[i] for i in order]),
                entering,
            )
            for text in list(running):
                if text.done:
                    running.remove(text)
                elif self.rng.random() < 0.1:
                    running.remove(text)
                    waiting.append(text)

    def _hit(self, text: Text) -> int:
        blocks = 0
        for key in self.keys(text)[: (text.known - 1) // BLOCK]:
            if key not in self.cached:
                break
            blocks += 1
        self.hits += blocks
        return blocks * BLOCK


@given(st.integers(0, 2**32 - 1))
@settings(derandomize=True, deadline=None, max_examples=150)
def test_a_prefix_hit_does_not_show_in_any_verdict(seed: int) -> None:
    """Prefixes shared by texts before, beside and in the same pass; preemption; special tokens."""
    engine = Engine(seed)
    engine.serve()
    for text in engine.texts:
        seen = len(text.f) - 1
        shares = engine.watchlist.shares(text.f[:seen])
        expected = judge_text(
            engine.watchlist.rules,
            shares,
            ~text.excluded[:seen],
            text.prompt,
            coded(text.roles),
            massive := text.f[:seen, FEATURES] > BOUND,
        )
        own = engine.ledger.finish(text.name, len(text.f), forget=False).coverage
        assert balanced(own)
        assert "prefix_cached" not in own.skipped
        sinks = int((massive & ~text.excluded[:seen]).sum())
        assert own.skipped.get("massive_norm", 0) == sinks
        found = engine.ledger.finish(text.name, len(text.f))
        for policy, one, other in zip(engine.watchlist.policies, expected, found, strict=True):
            assert_same(said(one, coverage=False), other, policy, coverage=False)


def test_the_simulated_engine_hits_its_cache() -> None:
    """Otherwise the property above would say nothing."""
    engines = [Engine(seed) for seed in range(20)]
    for engine in engines:
        engine.serve()

    assert sum(engine.hits for engine in engines) > 100


@pytest.mark.parametrize("lost", [True, False])
def test_what_is_not_remembered_is_counted(lost: bool) -> None:
    """A block that the memory let go counts as cached and not evaluated; its neighbours do not."""
    rng = random.Random(3)  # noqa: S311 - seeded texts
    watchlist = make_watchlist([replace(random_policy(rng, "p"), scope="both")])
    kept = prefix_store()
    ledger = Ledger(watchlist, prefix_store=kept)
    text = Text("r", random_rows(rng, 16), np.zeros(16, bool), 13, known=13)
    keys = [bytes([i]) for i in range(3)]
    ledger.admit("r", 13, keys=keys)
    ledger.ingest(forward_pass([(text, 0, text.f[:13])]), np.array([13]))
    ledger.finish("r", 14)
    if lost:
        kept._blocks.pop(keys[1])

    ledger.admit("r", 13, keys=keys)
    ledger.ingest(forward_pass([(text, 12, text.f[12:13])]), np.array([1]))

    covered = ledger.finish("r", 14, forget=False).coverage
    assert covered.evaluated == (9 if lost else 13)
    assert covered.skipped == {"not_forwarded": 1, **({"prefix_cached": 4} if lost else {})}


def test_a_pass_that_was_not_read_is_not_remembered() -> None:
    """What a later request reuses of it counts as not evaluated, never as quiet."""
    rng = random.Random(4)  # noqa: S311 - seeded texts
    kept = prefix_store()
    policy = replace(random_policy(rng, "p"), scope="both")
    ledger = Ledger(make_watchlist([policy]), prefix_store=kept)
    text = Text("r", random_rows(rng, 16), np.zeros(16, bool), 13, known=13)
    keys = [bytes([i]) for i in range(3)]
    ledger.admit("r", 13, keys=keys)
    ledger.ingest(forward_pass([(text, 0, text.f[:6])], ran=False), np.array([6]))
    ledger.ingest(forward_pass([(text, 6, text.f[6:13])]), np.array([7]))

    assert [kept.holds([key]) for key in keys] == [False, False, True]


def test_what_is_computed_again_is_remembered_again() -> None:
    """A preempted request brings back what was let go with its block while it waited."""
    rng = random.Random(5)  # noqa: S311 - seeded texts
    kept = prefix_store()
    policy = replace(random_policy(rng, "p"), scope="both")
    ledger = Ledger(make_watchlist([policy]), prefix_store=kept)
    text = Text("r", random_rows(rng, 16), np.zeros(16, bool), 13, known=13)
    keys = [bytes([i]) for i in range(3)]
    ledger.admit("r", 13, keys=keys)
    ledger.ingest(forward_pass([(text, 0, text.f[:10])]), np.array([10]))
    kept.clear()
    ledger.ingest(forward_pass([(text, 0, text.f[:6])]), np.array([6]), {"r"})
    ledger.ingest(forward_pass([(text, 6, text.f[6:13])]), np.array([7]))

    assert kept.holds(keys)
    assert ledger.finish("r", 14, forget=False).coverage.evaluated == 13
