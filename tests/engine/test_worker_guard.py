"""What a pass brings from the worker: on a CPU, as from a GPU, and over pipeline stages."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from saeguard.guard.forward_pass import ForwardPass
from saeguard.guard.install_taps import install_taps
from saeguard.guard.watchlist import WatchList
from saeguard.policy.types import Name, Selection
from saeguard.vllm.worker import pipeline_parallel
from saeguard.vllm.worker.guard import WorkerGuard
from tests.guard.watchlists import FEATURES, make_hook, make_policy, make_watchlist

CPU = torch.device("cpu")
EXCLUDED, VOCABULARY, ROOM = 3, 8, 16
IDS, START = ["a", "b"], np.array([0, 3, 4])


@pytest.fixture(params=["host", "device"])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Fetch passes as on a CPU, or as from a GPU: packed, in one copy."""
    if request.param == "device":
        event = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
        monkeypatch.setattr(torch.cuda, "Event", lambda: event)
        monkeypatch.setattr(WorkerGuard, "on_host", property(lambda _: False))
    return str(request.param)


def watchlist_of(*layers: int) -> WatchList:
    """Return a watch list of one policy that reads the layers."""
    policy = make_policy("p", Name("a"), {"a": Selection("f0", 0.5)})
    return make_watchlist([policy], [make_hook(layer) for layer in layers])


def guard_of(watchlist: WatchList, *layers: int, last: bool = True) -> WorkerGuard:
    """Return the guard of a pipeline stage that has some of the layers."""
    hooks = [hook for hook in watchlist.hooks if hook.layer in layers]
    taps = install_taps(watchlist, max_tokens=ROOM, slots=4, device=CPU, hooks=hooks)
    eligible = torch.ones(VOCABULARY, dtype=torch.bool)
    eligible[EXCLUDED] = False
    return WorkerGuard(watchlist, taps, taps[0].rows, eligible, CPU, last_stage=last)


def run(guard: WorkerGuard, x: torch.Tensor, first: int, *, times: int = 1) -> None:
    """Run a pass over four rows of two requests; vLLM's buffers are longer."""
    ids = torch.tensor([1, EXCLUDED, 2, 4, 5, 6], dtype=torch.int32)
    guard.begin_pass(IDS, START, ids, torch.arange(first, first + 6))
    for tap in guard.taps:
        for _ in range(times):
            torch.ops.saeguard.tap(x[:4].clone(), None, tap.layer)
    guard.end_pass()


def rows_of(seed: int) -> torch.Tensor:
    """Return a residual stream on which latents fire."""
    torch.manual_seed(seed)
    return torch.rand(4, FEATURES) + 1


def check(found: ForwardPass, seed: int, first: int) -> None:
    """Check everything that a pass brings."""
    x = rows_of(seed)
    expected = torch.cat([x, x.norm(dim=1)[:, None]], dim=1).numpy()
    np.testing.assert_allclose(found.f[:, : FEATURES + 1], expected, rtol=1e-5)
    assert found.ran
    assert found.request_ids == IDS
    assert found.positions.tolist() == [first, first + 1, first + 2, first + 3]
    assert found.eligible.tolist() == [True, False, True, True]
    assert found.eligible.dtype == bool


def taken(guard: WorkerGuard) -> Any:
    """Return the pending pass, which the runner's output takes along."""
    pending, guard.pending = guard.pending, None
    return pending


@pytest.mark.usefixtures("where")
def test_passes_under_way_keep_their_values() -> None:
    """Asynchronous scheduling collects a pass after later ones have run, in whatever order."""
    guard = guard_of(watchlist_of(0), 0)
    under_way = []
    for seed in range(4):
        run(guard, rows_of(seed), 10 * seed)
        under_way.append(taken(guard))
    found = {seed: guard.collect(under_way[seed]) for seed in (2, 0, 3, 1)}
    for seed, forward_pass in found.items():
        check(forward_pass, seed, 10 * seed)


@pytest.mark.usefixtures("where")
@pytest.mark.parametrize("times", [0, 2])
def test_a_tap_that_did_not_run_once_is_told(times: int) -> None:
    """A graph without the tap, or with two: nothing was read, and the rules must know."""
    guard = guard_of(watchlist_of(0), 0)
    run(guard, rows_of(0), 0, times=times)
    assert not guard.collect(taken(guard)).ran


@pytest.mark.usefixtures("where")
def test_stages_bring_all_layers_in_order() -> None:
    """The first stage's readings travel with the hidden states; columns are the watch list's."""
    watchlist = watchlist_of(0, 1)
    sender = guard_of(watchlist, 0, last=False)
    run(sender, rows_of(1), 5)
    assert sender.outgoing is not None
    sent = pipeline_parallel.put(Tensors({"hidden": torch.zeros(1)}), sender.outgoing)
    run(sender, rows_of(3), 9)  # a dummy pass overwrites the buffers, not what was sent

    last = guard_of(watchlist, 1)
    last.received = pipeline_parallel.take(sent)
    assert set(sent.tensors) == {"hidden"}
    run(last, rows_of(2), 5)
    found = last.collect(taken(last))

    check(found, 1, 5)
    width = FEATURES + 1
    second = found.f[:, width:]
    np.testing.assert_allclose(second[:, :-1], rows_of(2).numpy(), rtol=1e-5)


class Tensors:
    """Stands for vLLM's `IntermediateTensors`."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        """Hold tensors by name."""
        self.tensors = tensors
