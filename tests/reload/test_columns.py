"""Rows keep their columns while anybody reads them, and a list over columns is the list itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from saeguard.guard.install_taps import Write, install_taps, write_rows
from saeguard.guard.tap import Tap
from saeguard.guard.topk import RankedRows
from saeguard.guard.watchlist import Hook, WatchList
from saeguard.policy.types import Name, Selection
from saeguard.reload.columns import (
    CapacityError,
    Columns,
    allocate,
    assign_columns,
    check_fits,
    oldest_readable,
    over_tap_columns,
    row_ids,
    used,
    without_weights,
)
from saeguard.reload.worker_updates import merge_writes
from saeguard.sae import EncoderRows
from saeguard.sae.encoder import NORMS, encoder_in_memory
from tests.guard.watchlists import FEATURES, make_policy, make_watchlist, random_policy, seeded

D = 16


def hook(seeds: list[int], layer: int = 0) -> Hook:
    """Return a hook of one random row a seed; a seed is a row wherever it comes."""
    rows = []
    for seed in seeds:
        rng = torch.Generator().manual_seed(seed)
        rows.append(torch.randint(-8, 8, (D + 2,), generator=rng) / 8)
    rows_ = torch.stack(rows)
    return Hook(
        layer, D, rows_[:, :D].contiguous(), rows_[:, D].clone(), rows_[:, D + 1].clone(), 0
    )


def watching(seeds: list[int]) -> WatchList:
    """Return a list whose feature `j` is the sum of all rows from `j` on, or the last."""
    rng = seeded(sum(seeds))
    base = make_watchlist([random_policy(rng, f"p{i}") for i in range(3)], [hook(seeds)])
    first = np.minimum(np.arange(FEATURES), len(seeds) - 1)
    mix = tuple(
        (first[which] + rank, np.ones(len(which), np.float32))
        for rank in range(len(seeds))
        for which in [np.flatnonzero(len(seeds) - first > rank)]
    )
    return replace(base, mix=mix)


def everywhere(columns: tuple[Columns, ...]) -> list[int]:
    """Return how many columns there are at each layer."""
    return [len(c.held) for c in columns]


def test_capacity() -> None:
    """Half as many rows again, and at least 32; or what the operator says."""
    assert everywhere(allocate(watching([1, 2, 3]), None)) == [35]
    assert everywhere(allocate(watching(list(range(200))), None)) == [300]
    assert everywhere(allocate(watching([1, 2, 3]), 3)) == [3]
    with pytest.raises(CapacityError, match=r"watch 3 rows at layer 0, the taps .* hold 2"):
        allocate(watching([1, 2, 3]), 2)


def test_a_row_is_its_content() -> None:
    """Whatever its place; any of its values makes it another."""
    a, b = hook([1, 2]), hook([2, 1])
    assert row_ids(a) == row_ids(b)[::-1]
    for name in ("W", "b", "theta"):
        other = replace(a, **{name: getattr(a, name) + 1})
        assert not set(row_ids(other)) & set(row_ids(a))


def test_lists_come_and_go() -> None:
    """Random swaps on real taps: each list in use reads its own rows, whatever came after it."""
    rng = seeded(4)
    lists = [watching(rng.sample(range(30), rng.randint(1, 7))) for _ in range(60)]
    columns = allocate(lists[0], 16)
    at = [np.arange(len(lists[0].hooks[0].W))]
    first = over_tap_columns(lists[0], columns, at)
    (tap,) = install_taps(first, max_tokens=8, slots=1, device=torch.device("cpu"))
    buffers = [t.data_ptr() for t in (tap.W, tap.b, tap.theta, tap.f)]
    live = [(0, lists[0], first, used(lists[0].hooks, at))]
    refused = 0
    for number, watchlist in enumerate(lists[1:], 1):
        while len(live) > 1 and rng.random() < 0.4:
            live.pop(rng.randrange(len(live)))
        in_use = {0: frozenset().union(*(reads[0] for *_, reads in live))}
        ids = [row_ids(h) for h in watchlist.hooks]
        check_fits(columns, watchlist.hooks, ids, {})
        placed = assign_columns(columns, watchlist.hooks, ids, in_use, number)
        if placed is None:
            refused += 1
            assert len(in_use[0] | {0}) + len(ids[0]) > 16 - 1
            continue
        columns = placed.columns
        (which,) = placed.missing
        rows = {n: getattr(watchlist.hooks[0], n).numpy()[which] for n in ("W", "b", "theta")}
        write_rows([tap], Write(0, placed.at[0][which], rows))
        whole = over_tap_columns(watchlist, columns, placed.at, first.hooks)
        live.append((number, watchlist, whole, used(watchlist.hooks, placed.at)))
        x = torch.randint(-8, 8, (5, D)) / 8
        torch.ops.saeguard.tap(x, None, 0)
        for since, natural, over, reads in live:
            own = natural.hooks[0]
            pre = x @ own.W.t() + own.b
            f = (pre * (pre > own.theta)).numpy()
            assert np.array_equal(over.shares(tap.f[:5].numpy()), natural.shares(f))
            assert oldest_readable(columns, reads) <= since
    assert refused
    assert [t.data_ptr() for t in (tap.W, tap.b, tap.theta, tap.f)] == buffers


def test_what_cannot_be_served_is_refused() -> None:
    """More rows than room, another layer, another width: both values are told."""
    columns = allocate(watching([1, 2]), 4)
    for other, reason in (
        (hook(list(range(5))), "watch 5 rows at layer 0, the taps of this server hold 4"),
        (hook([1], layer=3), "watch layer 3, the model of this server is tapped at layer 0"),
        (replace(hook([1]), d_in=9), "width 9, the tap there has 16"),
    ):
        with pytest.raises(CapacityError, match=reason):
            check_fits(columns, [other], [row_ids(other)], {})
    twice = hook([1, 1, 1, 2, 2])
    check_fits(columns, [twice], [row_ids(twice)], {})
    more = hook([2, 3, 4, 5])
    check_fits(columns, [more], [row_ids(more)], {0: frozenset({1})})
    with pytest.raises(CapacityError, match="watch 4 rows at layer 0, 3 of them new beside the 2"):
        check_fits(columns, [more], [row_ids(more)], {0: frozenset({0, 1})})


def test_one_row_under_two_names() -> None:
    """It has one column, and its shares add up as they would with two."""
    natural = watching([1, 1, 2])
    columns = allocate(watching([7]), 4)
    ids = [row_ids(natural.hooks[0])]
    placed = assign_columns(columns, natural.hooks, ids, {}, 1)
    assert placed is not None
    whole = over_tap_columns(natural, placed.columns, placed.at)
    f = np.array([[0.5, 0.5, 2.0]], np.float32)
    over = np.zeros((1, 4), np.float32)
    over[0, placed.at[0]] = f
    assert np.array_equal(whole.shares(over), natural.shares(f))


def test_slim_holds_no_weights() -> None:
    """The rules need shapes only."""
    natural = watching([1, 2])
    bare = without_weights(natural)
    assert bare.columns == natural.columns
    assert bare.hooks[0].W.is_meta
    policy = make_policy("p", Name("a"), {"a": Selection("f0", 0.5)})
    assert without_weights(make_watchlist([policy])).policies == (policy,)


def normalised(rows: Hook) -> Hook:
    """Return the rows as those of an SAE that normalises each token."""
    kind = NORMS.index("layer_norm")
    return replace(rows, norm=torch.full((len(rows.W),), kind, dtype=torch.int64))


def test_norms() -> None:
    """Taps that compute none cannot serve one; those that do serve plain rows in any column."""
    plain, normed = hook([1, 2]), normalised(hook([1, 2]))
    assert not set(row_ids(plain)) & set(row_ids(normed))
    with pytest.raises(CapacityError, match="normalises each token, which the taps"):
        check_fits(allocate(watching([1, 2]), 4), [normed], [row_ids(normed)], {})
    first = replace(watching([1, 2]), hooks=(normed,))
    columns = allocate(first, 2)
    (tap,) = install_taps(
        over_tap_columns(first, columns, [np.arange(2)]),
        max_tokens=4,
        slots=1,
        device=torch.device("cpu"),
    )
    ids = [row_ids(plain)]
    check_fits(columns, [plain], ids, {})
    placed = assign_columns(columns, [plain], ids, {}, 1)
    assert placed is not None
    rows = {n: getattr(plain, n).numpy() for n in ("W", "b", "theta")}
    write_rows([tap], Write(0, placed.at[0], rows))
    x = torch.randn(3, D)
    torch.ops.saeguard.tap(x, None, 0)
    pre = x @ plain.W.t() + plain.b
    assert torch.allclose(tap.f[:3, placed.at[0]], pre * (pre > plain.theta), atol=1e-6)


def test_ranks() -> None:
    """Latents that fire by rank stay where they are; a lower threshold lowers what they show."""
    rows = EncoderRows(torch.randn(8, D), torch.zeros(8), torch.zeros(8))
    encoder = encoder_in_memory(rows, k=3)

    def ranked(latents: tuple[int, ...], screen: float) -> Hook:
        at = list(latents)
        screen_thresholds = torch.full((len(at),), screen)
        part = RankedRows(encoder, slice(0, len(at)), latents, screen_thresholds)
        plain = Hook(0, D, rows.W[at], rows.b[at], rows.theta[at], 0)
        return replace(plain, ranked=(part,))

    start = ranked((0, 5), 0.5)
    first = replace(watching([1, 2]), hooks=(start,))
    columns = allocate(first, 6)
    at = [np.arange(2)]
    (tap,) = install_taps(
        over_tap_columns(first, columns, at), max_tokens=4, slots=1, device=torch.device("cpu")
    )
    other = ranked((0, 6), 0.5)
    with pytest.raises(CapacityError, match="fire by rank, and the taps of this server hold other"):
        check_fits(columns, [other], [row_ids(other)], {})
    unranked = replace(start, ranked=())
    assert not set(row_ids(unranked)) & set(row_ids(start))
    placed = assign_columns(columns, [unranked], [row_ids(unranked)], {}, 1)
    assert placed is not None
    assert not set(placed.at[0].tolist()) & {0, 1}, "their columns are not for others"

    lower = ranked((5, 0), 0.25)
    ids = [row_ids(lower)]
    check_fits(columns, [lower], ids, {})
    placed = assign_columns(columns, [lower], ids, {0: frozenset({0, 1})}, 2)
    assert placed is not None
    assert placed.at[0].tolist() == [1, 0]
    assert not len(placed.missing[0])
    # What passes before showed of them had higher bars.
    assert oldest_readable(placed.columns, used([lower], placed.at)) == 2
    write_rows([tap], Write(0, placed.at[0], {"screen": np.array([0.25, 0.75], np.float32)}))
    assert tap.ranked[0].screen.tolist() == [0.5, 0.25]


def ranking_tap() -> Tap:
    """Return a tap of twelve columns, the first four of latents that fire by rank."""
    rng = torch.Generator().manual_seed(3)
    rows = EncoderRows(torch.randn(8, D, generator=rng), torch.zeros(8), torch.zeros(8))
    part = RankedRows(encoder_in_memory(rows, k=3), slice(0, 4), (0, 1, 2, 3), torch.ones(4))
    first = replace(normalised(hook(list(range(12)))), ranked=(part,))
    cpu = torch.device("cpu")
    (tap,) = install_taps(replace(watching([1]), hooks=(first,)), max_tokens=4, slots=1, device=cpu)
    return tap


def test_writes_that_wait_are_as_many_as_columns() -> None:
    """However many lists came between two passes; the taps then hold the same."""
    rng = np.random.default_rng(8)
    one, all_ = ranking_tap(), ranking_tap()
    waiting: tuple[Write, ...] = ()
    for _ in range(60):
        at = rng.choice(np.arange(4, 12), int(rng.integers(1, 5)), replace=False)
        new = hook(rng.integers(100, 999, len(at)).tolist())
        rows = {n: getattr(new, n).numpy() for n in ("W", "b", "theta")}
        if rng.random() < 0.5:
            rows["norm"] = np.full(len(at), NORMS.index("layer_norm"))
        low = rng.choice(4, int(rng.integers(1, 5)), replace=False)
        screen_thresholds = {"screen": rng.uniform(0.2, 1.2, len(low)).astype(np.float32)}
        writes = (
            Write(0, low, screen_thresholds),
            Write(0, at, rows),
            Write(7, at, rows),
            Write(7, low, screen_thresholds),
        )
        for write in writes:
            write_rows([one], write)
        waiting = merge_writes(waiting, writes)
        told = [(w.layer, int(column)) for w in waiting for column in w.columns]
        assert len(told) == len(set(told)) <= 2 * 12
        if rng.random() < 0.1:
            for write in waiting:
                write_rows([all_], write)
            waiting = ()
            for name in ("W", "b", "theta", "norm"):
                assert torch.equal(getattr(one, name), getattr(all_, name))
            assert torch.equal(one.ranked[0].screen, all_.ranked[0].screen)
    assert one.ranked[0].screen.max() < 1
    assert len(set(one.norm.tolist())) == 2 if one.norm is not None else False
