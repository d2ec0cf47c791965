"""What policies compile to: edits of clamps, shares of features, and limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from saeguard.features.types import Feature, Term
from saeguard.features.value import shares_of
from saeguard.guard import compiled_rules
from saeguard.guard.clamp.build import _edit
from saeguard.guard.clamp.condition_program import compile_program
from saeguard.guard.compiled_rules import RulesError, compile_rules
from saeguard.guard.watchlist import ClampRows, WatchListError
from saeguard.policy.types import Clamp, Edit, Name, Or, Selection
from tests.guard.watchlists import make_policy

FEATURE = Feature("f", "", "none", (Term(0, 1.0),), None, (Term(0, 1.0),), 1.0, 5.0, 0.5, {})
"""Its calibrated range is 1 to 5."""


@pytest.mark.parametrize(
    ("how", "amount", "weight", "became"),
    [
        ("to", 0.0, 1.0, {-3.0: 1.0, 0.0: 1.0, 9.0: 1.0}),
        ("to", 0.5, 2.0, {0.0: 6.0, 9.0: 6.0}),
        ("activation", 3.5, 2.0, {0.0: 7.0, 9.0: 7.0}),
        ("activation", 3.5, -1.0, {0.0: -3.5, 9.0: -3.5}),
        ("scale", 0.5, 2.0, {0.0: 0.0, 3.0: 1.5}),
        ("scale", -2.0, 1.0, {3.0: -6.0}),
        ("ablate", 0.0, 2.0, {0.0: 0.0, 9.0: 0.0}),
        ("at_most", 0.5, 1.0, {-1.0: -1.0, 2.0: 2.0, 3.0: 3.0, 3.5: 3.0, 9.0: 3.0}),
    ],
)
def test_edits(how: Edit, amount: float, weight: float, became: dict[float, float]) -> None:
    """Each way to clamp makes of an activation what the documentation says."""
    clamp = Clamp(("f",), amount, how)
    policy = make_policy("p", Name("a"), {"a": Selection("f", 0.5)}, clamp=clamp)
    scale, target, cap = _edit(policy, clamp, FEATURE, weight)
    rows = ClampRows(
        0,
        (0,),
        (0,),
        (0,),
        torch.tensor([target]),
        torch.zeros(1, 1),
        torch.tensor([scale]),
        torch.tensor([cap]),
    )

    edited = rows.edited(torch.tensor(list(became))[:, None])[:, 0]

    assert edited.tolist() == list(became.values())


def test_a_cap_that_would_raise_is_refused() -> None:
    """With a negative weight, at most would become at least."""
    clamp = Clamp(("f",), 0.5, "at_most")
    policy = make_policy("p", Name("a"), {"a": Selection("f", 0.5)}, clamp=clamp)

    with pytest.raises(WatchListError, match=r"p\.yaml: clamp: at_most would raise"):
        _edit(policy, clamp, FEATURE, -1.0)


def test_shares_agree_to_the_last_bit() -> None:
    """NumPy on the host and torch on the device add latents up in one order."""
    rng = np.random.default_rng(0)
    f = rng.random((7, 9), np.float32)
    dense = np.zeros((9, 3), np.float32)
    mix = []
    for columns in ([4, 0, 8], [1, 2], [7]):  # features of three, two and one latents
        weight = rng.random(len(columns), np.float32)
        mix.append((np.array(columns), weight))
        dense[columns, np.arange(len(columns))] += weight
    low, span = rng.random((2, 3), np.float32)

    host = shares_of(tuple(mix), low, span, f)
    there = [(torch.from_numpy(c), torch.from_numpy(w)) for c, w in mix]
    device = shares_of(tuple(there), *map(torch.from_numpy, (low, span, f)))

    assert np.array_equal(host, device.numpy())
    assert np.allclose(host, (f @ dense - low) / span, atol=1e-5)


def test_equal_parts_of_conditions_are_one_node() -> None:
    """On the device, two clamps of one condition cost what one does; terms are shared, too."""
    condition = Or((Name("a"), Name("b")))
    detect = {"a": Selection("f0", 0.5), "b": Selection("f1", 0.5)}
    column = {"tiny/f0": 0, "tiny/f1": 1}
    one = compile_rules([make_policy("p", condition, detect)], column)
    two = compile_rules([make_policy(n, condition, detect) for n in ("p", "q")], column)

    assert len(one.tables.terms) == len(two.tables.terms) == 2
    assert len(one.tables.traces) == len(two.tables.traces) == 2
    names = {"a": 0, "b": 1}
    assert compile_program([(condition, names)]).size == 3
    assert compile_program([(condition, names), (condition, names)]).size == 3


def test_tables_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than fits is refused, with both numbers."""
    monkeypatch.setattr(compiled_rules, "MAX_NODES", 2)
    policy = make_policy(
        "p", Or((Name("a"), Name("b"))), {"a": Selection("f0", 0.5), "b": Selection("f1", 0.5)}
    )

    with pytest.raises(RulesError, match="3 parts in all, at most 2"):
        compile_rules([policy], {"tiny/f0": 0, "tiny/f1": 1})


def test_no_cap_is_no_cap() -> None:
    """Without scale and cap, the target is what a latent becomes."""
    rows = ClampRows(0, (0,), (0,), (0,), torch.tensor([2.0]), torch.zeros(1, 1))

    assert rows.edited(torch.tensor([[0.0], [math.inf]])).tolist() == [[2.0], [2.0]]
