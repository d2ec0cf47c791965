"""The tap and the clamp inside it do what a plain reading of the whole text asks for."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import structlog
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from saeguard.guard import tap as tapping
from saeguard.guard.clamp import state as clamping
from saeguard.guard.clamp.state import Clamp as ClampState
from saeguard.guard.forward_pass import lay_out
from saeguard.guard.host_loop import HostLoop
from saeguard.guard.install_taps import install_taps
from saeguard.guard.scopes import OUTPUT, ROLES
from saeguard.guard.tap import FAILURES, TAPS, Tap, tap_output
from saeguard.guard.watchlist import ClampRows, WatchList, clamps_digest
from saeguard.policy.types import Clamp, Name, Not, Policy, Selection, Window
from saeguard.reload.worker_updates import Admitted
from saeguard.vllm.worker.guard import WorkerGuard
from tests import reference
from tests.guard.watchlists import (
    FEATURES,
    LOW,
    SPAN,
    make_hook,
    make_policy,
    make_watchlist,
    random_activations,
    random_policy,
    random_roles,
    seeded,
)

SEEDS = st.integers(0, 2**32 - 1)
CPU = torch.device("cpu")
MAX_TOKENS = 256
DRAFTS = 3
SINK = 20.0
"""Norm above which a row is an attention sink; no other row reaches it."""


@pytest.fixture(autouse=True)
def _no_taps_left() -> Iterator[None]:
    """Leave no tap behind for other tests."""
    yield
    TAPS.clear()


# --- the plain reading --------------------------------------------------------------------------


def activations(residual: list[float]) -> list[float]:
    """Return what the latents of `make_hook` make of one token's residual."""
    return [x if j % 2 == 0 or x > 0.5 else 0.0 for j, x in enumerate(residual)]


def edited(
    policy: Policy,
    text: list[list[float]],
    eligible: list[bool],
    prompt: int,
    roles: list[str],
) -> list[int]:
    """Return the positions at which a policy clamps."""
    shares = {
        f"f{j}": [(f[j] - float(LOW[j])) / float(SPAN[j]) for f in map(activations, text)]
        for j in range(FEATURES)
    }
    looked = [
        t
        for t in range(len(text))
        if eligible[t]
        and np.linalg.norm(text[t]) <= SINK
        and reference.in_scope(policy, t, prompt, roles)
    ]
    return reference.edited(policy, shares, looked, len(text))


# --- a watch list of clamps and a model's worker, in small --------------------------------------


@dataclass
class Request:
    """What the forward has been given of a request so far."""

    slot: int
    prompt: int
    roles: list[str]
    enforced: list[bool]
    text: list[list[float]] = field(default_factory=list)
    eligible: list[bool] = field(default_factory=list)
    settled: int = 0
    """Tokens before the first one of its last pass: no draft behind them is rejected any more."""


def clamp_of(tap: Tap) -> ClampState:
    """Return the clamp of a tap that has one."""
    [clamp] = tap.clamps.values()
    return clamp


def clamping_watchlist(policies: list[Policy]) -> WatchList:
    """Return a watch list in which policy `i` clamps latent `i`, the last one a second, too."""
    owner = [*range(len(policies)), len(policies) - 1]
    W_dec = torch.tensor(
        [[((3 * i + j) % 5 - 2) / 4 for j in range(FEATURES)] for i in range(len(owner))]
    )
    rows = ClampRows(
        layer=0,
        policies=tuple(range(len(policies))),
        columns=tuple(range(len(owner))),
        owner=tuple(owner),
        target=torch.tensor([0.5 * i for i in range(len(owner))]),
        W_dec=W_dec,
        scale=torch.tensor([[0.0, 0.5, 1.0, -2.0][i % 4] for i in range(len(owner))]),
        cap=torch.tensor([[torch.inf, 1.5, 0.25, 0.75][i % 4] for i in range(len(owner))]),
    )
    return make_watchlist(policies, [make_hook(max_norm=SINK)], [rows])


def admit(tap: Tap, request: Request) -> None:
    """Start a request, as the worker does."""
    clamping.admit(clamp_of(tap), request.slot, request.enforced)


def forward(
    tap: Tap,
    rng: random.Random,
    batch: list[tuple[Request, int, list[list[float]], list[bool]]],
    *,
    halves: bool,
    padding: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run one pass over requests' rows; return the residual before and after."""
    total = sum(len(rows) for _, _, rows, _ in batch)
    query_start = np.cumsum([0, *(len(rows) for _, _, rows, _ in batch)])
    positions = torch.cat([torch.arange(s, s + len(rows)) for _, s, rows, _ in batch])
    role = [
        OUTPUT if t >= r.prompt else ROLES.index(r.roles[t])  # type: ignore[arg-type]
        for r, s, rows, _ in batch
        for t in range(s, s + len(rows))
    ]
    lay_out(tap.rows, [r.slot for r, *_ in batch], query_start, positions, np.array(role))
    tap.rows.eligible[:total] = torch.tensor([w for *_, flags in batch for w in flags])
    x = torch.tensor(
        [row for _, _, rows, _ in batch for row in rows] + [[9.0] * FEATURES] * padding
    )
    residual = None
    hidden = x.clone()
    if halves:
        # Halves that add up exactly, values beside the grid included.
        residual = torch.tensor([[rng.randint(-8, 8) / 8 for _ in row] for row in x.tolist()])
        residual = torch.where(x * 8 == (x * 8).round(), residual, x / 2)
        hidden = x - residual
        residual, hidden = residual.nan_to_num(), torch.where(x.isfinite(), hidden, x)
    kept = None if residual is None else residual.clone()
    tap.ticks.zero_()
    torch.ops.saeguard.tap(hidden, residual, 0)
    assert int(tap.ticks) == 1
    if residual is not None:  # one half takes the edit
        torch.testing.assert_close(residual, kept, rtol=0, atol=0, equal_nan=True)
    return x, hidden if residual is None else hidden + residual


def as_on_a_device(tap: Tap) -> Tap:
    """Return a tap that runs by torch alone, as it does where the model is not on a CPU."""
    for digest, clamp in tap.clamps.items():
        tap.clamps[digest] = replace(clamp, on_host=None)
    tapping.TAPS[tap.layer] = replace(tap, loop=None)
    return tapping.TAPS[tap.layer]


def check(seed: int) -> None:
    """Run random requests through one tap in random passes; compare every row."""
    rng = seeded(seed)
    policies = [
        random_policy(
            rng,
            f"p{i}",
            longest=6,
            clamp=Clamp((f"f{i}",), 0.0, when=rng.choice(["rest", "matched", "always"])),
        )
        for i in range(3)
    ]
    watchlist = clamping_watchlist(policies)
    (tap,) = install_taps(watchlist, max_tokens=MAX_TOKENS, slots=4, device=CPU)
    if seed % 2:
        tap = as_on_a_device(tap)
    requests: dict[int, Request] = {}
    for _ in range(12):
        for slot in range(1, 5):
            if slot not in requests or rng.random() < 0.05:  # a new request takes the slot
                prompt = rng.randint(1, 8)
                enforced = [rng.random() < 0.7 for _ in policies]
                requests[slot] = Request(slot, prompt, random_roles(rng, prompt), enforced)
                admit(tap, requests[slot])
        batch = []
        for request in rng.sample(list(requests.values()), rng.randint(1, 4)):
            done = len(request.text)
            # Rows are computed anew from 0 after preemption, or from the first rejected draft.
            back = max(request.settled, done - rng.randint(0, DRAFTS))
            start = rng.choice([done, done, back, 0])
            if start == 0 and done and rng.random() < 0.7:
                start = done
            request.settled = start + 1
            n = rng.choice([1, 1, rng.randint(1, 20)])
            rows = random_activations(rng, n).astype(float).tolist()
            if rng.random() < 0.2:
                rows[rng.randrange(n)][rng.randrange(FEATURES)] = SINK + 1
            if rng.random() < 0.1:
                rows[rng.randrange(n)][rng.randrange(FEATURES)] = rng.choice([np.nan, np.inf])
            flags = [rng.random() < 0.9 for _ in range(n)]
            request.text[start:], request.eligible[start:] = rows, flags
            batch.append((request, start, rows, flags))
        x, y = forward(tap, rng, batch, halves=rng.random() < 0.5, padding=rng.choice([0, 0, 3]))
        compare(tap, watchlist, batch, x, y)


def compare(tap: Tap, watchlist: WatchList, batch: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    """Compare every row of a pass with the plain reading."""
    (rows,) = watchlist.clamps
    at = 0
    for request, start, passed, _ in batch:
        text = request.text
        where = [
            edited(p, text, request.eligible, request.prompt, request.roles) if on else []
            for p, on in zip(watchlist.policies, request.enforced, strict=True)
        ]
        for i in range(len(passed)):
            t = start + i
            acts = [t in edits and bool(np.linalg.norm(text[t]) <= SINK) for edits in where]
            f = activations(text[t])
            norm = np.linalg.norm(text[t])
            assert float(tap.f[at, -1]) == pytest.approx(norm, rel=1e-6, nan_ok=True)
            assert torch.equal(tap.f[at, :-1], torch.tensor(f)) or not np.isfinite(text[t]).all()
            assert acts == clamp_of(tap).acted[at].tolist(), (t, where)
            expected = x[at].clone()
            assert rows.scale is not None
            assert rows.cap is not None
            for j, owner, scale, target, cap, w in zip(
                rows.columns, rows.owner, rows.scale, rows.target, rows.cap, rows.W_dec, strict=True
            ):
                if acts[owner]:
                    expected += (min(float(scale) * f[j] + float(target), float(cap)) - f[j]) * w
            if np.isfinite(text[t]).all():
                assert torch.allclose(expected, y[at], rtol=0, atol=1e-5), t
            at += 1
    assert torch.equal(x[at:], y[at:]), "padding is nobody's"


@given(SEEDS)
@settings(derandomize=True, deadline=None, max_examples=25)
def test_clamps_from_the_first_match_on(seed: int) -> None:
    """Chunks, batches, rewinds, windows, scopes, padding and NaN: the text's own edit, always."""
    check(seed)


@given(SEEDS)
@settings(
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_clamps_alike_where_the_ring_wraps(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """The same with a ring as short as it can be."""
    monkeypatch.setattr(clamping, "MAX_DRAFTS", DRAFTS)
    check(seed)


@pytest.mark.slow
@given(SEEDS)
@settings(deadline=None, max_examples=2_000)
def test_clamps_from_the_first_match_on_at_length(seed: int) -> None:
    """The same, on a hundred times as many passes."""
    check(seed)


# --- facts --------------------------------------------------------------------------------------


def one_tap(policy: Policy, slots: int = 2) -> tuple[Tap, WatchList]:
    """Install one clamping policy."""
    rows = ClampRows(0, (0,), (0,), (0,), torch.zeros(1), torch.eye(FEATURES)[:1])
    watchlist = make_watchlist([policy], [make_hook()], [rows])
    return install_taps(watchlist, max_tokens=MAX_TOKENS, slots=slots, device=CPU)[0], watchlist


def simple(**more: Any) -> Policy:
    """Return a policy that clamps feature 0 to nothing where it exceeds a half."""
    return make_policy(
        "p", Name("a"), {"a": Selection("f0", 0.5)}, clamp=Clamp(("f0",), 0.0), **more
    )


def anywhere(rows: int) -> np.ndarray:
    """Return places that a policy of scope `both` looks at."""
    return np.full(rows, OUTPUT)


def run(tap: Tap, slot: int, start: int, hidden: torch.Tensor) -> torch.Tensor:
    """Run one request's rows through the op; return them edited."""
    positions = torch.arange(start, start + len(hidden))
    lay_out(tap.rows, [slot], np.array([0, len(hidden)]), positions, anywhere(len(hidden)))
    hidden = hidden.clone()
    torch.ops.saeguard.tap(hidden, None, 0)
    return hidden


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_request_that_is_not_enforced_keeps_every_bit(dtype: torch.dtype) -> None:
    """Beside one that is clamped, in one pass."""
    tap, _ = one_tap(simple())
    clamping.admit(clamp_of(tap), 1, [True])
    clamping.admit(clamp_of(tap), 2, [False])
    torch.manual_seed(0)
    before = (torch.randn(20, FEATURES) + 2).to(dtype)
    after = before.clone()
    lay_out(tap.rows, [1, 2], np.array([0, 10, 20]), torch.arange(10).repeat(2), anywhere(20))
    torch.ops.saeguard.tap(after, None, 0)

    assert not torch.equal(before[:10], after[:10])
    assert (
        before[10:].numpy(force=True).tobytes() == after[10:].numpy().tobytes()
        if (dtype == torch.float32)
        else torch.equal(before[10:].view(torch.int16), after[10:].view(torch.int16))
    )


def test_a_match_of_a_rejected_draft_is_taken_back() -> None:
    """The position comes again, with another token, and is not edited."""
    tap, _ = one_tap(simple())
    clamping.admit(clamp_of(tap), 1, [True])
    quiet, loud = torch.full((1, FEATURES), 0.25), torch.full((1, FEATURES), 2.0)

    assert run(tap, 1, 0, torch.cat([quiet, loud]))[1, 0] == 0
    assert torch.equal(quiet, run(tap, 1, 1, quiet))


def test_a_slot_that_is_used_again_remembers_nothing() -> None:
    """Neither the match nor the window of the request before."""
    tap, _ = one_tap(simple(window=Window(1, 4)))
    quiet, loud = torch.full((1, FEATURES), 0.25), torch.full((1, FEATURES), 2.0)
    clamping.admit(clamp_of(tap), 1, [True])
    run(tap, 1, 0, loud)
    clamping.admit(clamp_of(tap), 1, [True])

    assert torch.equal(quiet, run(tap, 1, 1, quiet))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("negated", [False, True])
def test_what_cannot_be_read_starts_no_clamp(bad: float, *, negated: bool) -> None:
    """The host calls such a token an error; the forward must not act on it."""
    policy = simple()
    if negated:
        policy = make_policy(
            "p", Not(Name("a")), dict(policy.detect), clamp=policy.clamp, window=Window(1, 2)
        )
    tap, _ = one_tap(policy)
    clamping.admit(clamp_of(tap), 1, [True])
    calm = torch.full((1, FEATURES), 2.0 if negated else 0.25)

    run(tap, 1, 0, torch.full((1, FEATURES), bad))

    assert not clamp_of(tap).acted[0, 0]
    assert torch.equal(calm, run(tap, 1, 1, calm))


def test_nan_beside_a_match_does_not_hide_it() -> None:
    """`2 of 3` counts the two that hold, whatever lies between."""
    tap, _ = one_tap(simple(window=Window(2, 3)))
    clamping.admit(clamp_of(tap), 1, [True])
    rows = torch.full((3, FEATURES), 2.0)
    rows[1] = torch.nan
    run(tap, 1, 0, rows)

    assert clamp_of(tap).acted[:3, 0].tolist() == [False, False, True]


@pytest.mark.parametrize("tested", [False, True])
def test_the_self_test_is_not_clamped(*, tested: bool) -> None:
    """It compares with what the next block consumes, so nothing may be edited before it passed."""
    tap, watchlist = one_tap(simple())
    eligible_ids = torch.ones(8, dtype=torch.bool)
    digest = clamps_digest(watchlist)
    admitted = Admitted(digest, frozenset((p.id, p.mode) for p in watchlist.policies))
    guard = WorkerGuard(
        watchlist, (tap,), tap.rows, eligible_ids, CPU,
        announced={"r": (1, admitted)}, free=[1], clamp_lists={digest: watchlist},
    )  # fmt: skip
    guard.tested, guard.computed = tested, {"r": 0}
    hidden = torch.full((2, FEATURES), 2.0)
    guard.begin_pass(["r"], np.array([0, 2]), torch.tensor([3, 4]), torch.arange(2))
    torch.ops.saeguard.tap(hidden, None, 0)

    assert clamp_of(tap).acted[:2, 0].tolist() == [tested] * 2
    assert torch.equal(hidden, torch.full((2, FEATURES), 2.0)) != tested


def test_nan_stays_nan() -> None:
    """A latent below its threshold would be 0, one that cannot be told is not."""
    watchlist = make_watchlist([simple()], [make_hook()])
    (tap,) = install_taps(watchlist, max_tokens=8, slots=1, device=CPU)
    torch.ops.saeguard.tap(torch.full((2, FEATURES), torch.nan), None, 0)

    assert tap.f[:2].isnan().all()


@pytest.mark.parametrize("by_loop", [False, True])
def test_an_error_in_the_encoder_is_seen_as_nan(
    monkeypatch: pytest.MonkeyPatch, *, by_loop: bool
) -> None:
    """Serving goes on, the activations say that nothing was read, the pass counts as run."""
    watchlist = make_watchlist([simple()], [make_hook()])
    (tap,) = install_taps(watchlist, max_tokens=8, slots=1, device=CPU)

    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(HostLoop, "read", fail if by_loop else lambda *_: False)
    monkeypatch.setattr(tapping.torch, "addmm", fail)
    hidden = torch.ones(2, FEATURES)
    torch.ops.saeguard.tap(hidden, None, 0)

    assert tap.f[:2].isnan().all()
    assert int(tap.ticks) == 1
    assert torch.equal(hidden, torch.ones(2, FEATURES))


def test_a_batch_dimension_of_one_is_no_row() -> None:
    """Blocks that are Transformers' own hand on `[1, tokens, d]`: read and edited all the same."""
    tap, _ = one_tap(simple())
    torch.manual_seed(0)
    halves = torch.randn(2, 5, FEATURES) + 1
    seen = []
    for shape in ((5, FEATURES), (1, 5, FEATURES)):
        clamping.admit(clamp_of(tap), 1, [True])
        lay_out(tap.rows, [1], np.array([0, 5]), torch.arange(5), anywhere(5))
        hidden, residual = (half.clone().reshape(shape) for half in halves)
        torch.ops.saeguard.tap(hidden, residual, 0)
        seen.append((tap.f[:5].clone(), hidden.reshape(5, FEATURES)))

    assert not torch.equal(seen[0][1], halves[0])
    for flat, batched in zip(*seen, strict=True):
        assert torch.equal(flat, batched)


def test_several_streams_a_token_are_seen_as_nan() -> None:
    """No row may keep what an earlier pass left there, whichever dimension counts tokens."""
    watchlist = make_watchlist([simple()], [make_hook()])
    (tap,) = install_taps(watchlist, max_tokens=8, slots=1, device=CPU)
    torch.ops.saeguard.tap(torch.ones(4, 2, FEATURES), None, 0)

    assert tap.f.isnan().all()


def test_half_precision_is_added_in_float32() -> None:
    """`hidden + residual` loses nothing that float32 holds."""
    watchlist = make_watchlist([simple()], [make_hook()])
    (tap,) = install_taps(watchlist, max_tokens=8, slots=1, device=CPU)
    hidden = torch.full((1, FEATURES), 256.0, dtype=torch.bfloat16)
    residual = torch.full((1, FEATURES), 0.5, dtype=torch.bfloat16)
    torch.ops.saeguard.tap(hidden, residual, 0)

    assert tap.f[0, :-1].tolist() == [256.5] * FEATURES
    assert float(tap.f[0, -1]) == pytest.approx(256.5 * FEATURES**0.5)


def test_no_tap_no_effect() -> None:
    """A graph that outlived its guard goes on; the self-test reports it."""
    TAPS.clear()
    hidden = torch.ones(1, FEATURES)
    torch.ops.saeguard.tap(hidden, None, 0)

    assert torch.equal(hidden, torch.ones(1, FEATURES))


class Block(nn.Module):
    """A decoder layer that returns two halves, as most of vLLM's do."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((FEATURES,), 2.0))

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a block's output and the residual it has not been added to."""
        return x * self.scale, residual + x


class Stack(nn.Module):
    """Two blocks; the tap lies between them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.blocks[0].register_forward_hook(lambda _m, _a, output: tap_output(output, 0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of both halves."""
        hidden, residual = self.blocks[0](x, torch.zeros_like(x))
        hidden, residual = self.blocks[1](hidden, residual)
        return hidden + residual


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_tap_is_traced_into_the_graph(backend: str) -> None:
    """Compiled without a graph break, it sees and edits what it does uncompiled."""
    tap, _ = one_tap(simple())
    model = Stack().requires_grad_(requires_grad=False)
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    x = torch.arange(4 * FEATURES).reshape(4, FEATURES) / 8
    seen = []
    for run_model in (model, compiled):
        clamping.admit(clamp_of(tap), 1, [True])
        lay_out(tap.rows, [1], np.array([0, 4]), torch.arange(4), anywhere(4))
        tap.ticks.zero_()
        tap.f.zero_()
        seen.append((run_model(x), tap.f[:4].clone(), clamp_of(tap).acted[:4].clone()))
        assert int(tap.ticks) == 1

    for eager, other in zip(*seen, strict=True):
        assert torch.equal(eager, other)
    assert seen[0][2].any()
    TAPS.clear()
    assert not torch.equal(seen[0][0], compiled(x)), "the graph asks for the tap on each run"


def test_passes_of_other_lengths_do_not_disturb() -> None:
    """Rows that are shorter than the buffers leave the rest alone."""
    watchlist = make_watchlist([simple()], [make_hook()])
    (tap,) = install_taps(watchlist, max_tokens=8, slots=1, device=CPU)
    tap.f.fill_(7)
    torch.ops.saeguard.tap(torch.ones(3, FEATURES), None, 0)

    assert (tap.f[3:] == 7).all()


def test_a_tap_that_raises_is_told_where_it_happens() -> None:
    """Its values are NaN, and the log of its own rank says why: first, and each doubling."""
    watchlist = make_watchlist([simple()], [make_hook()])
    (tap,) = install_taps(watchlist, max_tokens=8, slots=1, device=CPU)
    FAILURES.clear()
    with structlog.testing.capture_logs() as lines:
        for _ in range(5):
            tap.f.zero_()
            torch.ops.saeguard.tap(torch.ones(3, FEATURES + 1), None, 0)
            assert tap.f.isnan().all()

    assert [line["passes"] for line in lines] == [1, 2, 4]
    assert all(line["log_level"] == "error" and line["layer"] == 0 for line in lines)
    assert str(FEATURES + 1) in lines[0]["error"]
