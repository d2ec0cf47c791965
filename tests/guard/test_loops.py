"""The compiled loops cost what fires, and say the same wherever they run."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saeguard.guard import compiled
from saeguard.guard.judge import judge_text, score_text
from saeguard.guard.ledger import Ledger
from saeguard.guard.read_rows import ingest_rows, reads_of
from saeguard.policy.types import And, Name, Not, Over, Policy, Scope, Selection, Window
from tests.guard.test_ledger import forward_pass, text_of
from tests.guard.watchlists import (
    FEATURES,
    LOW,
    SPAN,
    coded,
    make_policy,
    make_watchlist,
    random_activations,
    random_policy,
    random_roles,
    seeded,
)

CHECK = "from tests.guard.test_judge import check_world\nfor seed in range(40): check_world(seed)\n"


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter."""
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env={**os.environ, **env}, capture_output=True, text=True, check=False
    )


def test_the_loops_are_ordinary_python() -> None:
    """Without compilation, they say what the plain reading says."""
    ran = python(CHECK, NUMBA_DISABLE_JIT="1")
    assert (ran.returncode, ran.stderr) == (0, "")


def test_a_machine_without_numba_is_told_and_judges() -> None:
    """A warning names the reason, and verdicts are the same."""
    warn = "from saeguard.guard.compiled import warn_if_slow\nwarn_if_slow()\n"
    ran = python(f"import sys\nsys.modules['numba'] = None\n{warn}{CHECK}")
    assert ran.returncode == 0, ran.stderr
    assert "cannot compile its rules" in ran.stdout + ran.stderr
    assert "numba" in ran.stdout + ran.stderr


@pytest.mark.skipif(compiled.why_not() is not None, reason="the loops are not compiled")
def test_vllm_can_look_at_every_attribute() -> None:
    """As it does when it registers kernels: each that has a `__dict__` has a mapping for it."""
    wrong = [
        (module.__name__, name)
        for module in list(sys.modules.values())
        if getattr(module, "__name__", "").startswith(("llvmlite", "numba", "saeguard"))
        for name, value in list(vars(module).items())
        if hasattr(value, "__dict__") and not hasattr(vars(value), "get")
    ]
    assert wrong == []


def test_what_cannot_be_cached_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """No folder is writable: there is no cache, and no error."""
    monkeypatch.setattr(compiled, "_writable", lambda _folder: False)
    compiled.cache_folder.cache_clear()
    try:
        assert compiled.cache_folder() is None
        assert compiled.compiled(compiled._probe)(2) == 3
    finally:
        compiled.cache_folder.cache_clear()


def test_the_cache_is_of_these_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of any module that is compiled has a cache of its own."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    folders = []
    for names in (compiled.LOOPS, compiled.LOOPS[1:]):
        monkeypatch.setattr(compiled, "LOOPS", names)
        compiled.cache_folder.cache_clear()
        folders.append(compiled.cache_folder())
    compiled.cache_folder.cache_clear()

    assert all(folder is not None and folder.is_relative_to(tmp_path) for folder in folders)
    assert folders[0] != folders[1]


def test_every_module_with_compiled_code_is_in_the_cache_key() -> None:
    """Otherwise an old version of it would be run after a change."""
    folder = Path(compiled.__file__).parent
    using = {p.stem for p in folder.glob("*.py") if "guard.compiled import " in p.read_text()}
    assert using | {"tables"} == set(compiled.LOOPS)


def policies_of(seed: int) -> list[Policy]:
    """Return policies of every kind over few features."""
    rng = seeded(seed)
    return [random_policy(rng, f"p{i}", longest=20) for i in range(5)]


@given(st.integers(0, 2**32 - 1))
@settings(derandomize=True, deadline=None, max_examples=150)
def test_evaluating_everything_changes_nothing(seed: int) -> None:
    """Scores token by token, with nothing left out, lead to the verdict of what was touched."""
    rng = seeded(seed)
    tokens = rng.randint(1, 40)
    prompt = rng.randint(0, tokens)
    watchlist = make_watchlist(policies_of(seed))
    f = random_activations(rng, tokens)
    f[np.array([rng.random() < 0.7 for _ in range(tokens)])] = 0  # most tokens are quiet
    given = (watchlist.rules, watchlist.shares(f), np.ones(tokens, bool), prompt)
    roles = coded(random_roles(rng, prompt))

    verdicts = judge_text(*given, roles)
    scored = score_text(*given, roles)

    for p, (policy, verdict) in enumerate(zip(watchlist.policies, verdicts, strict=True)):
        score = scored.score[:, p]
        looked = scored.looked[:, watchlist.rules.scope[p]]
        if policy.window.last:
            last = score[looked][-1:]
            assert verdict.score == (last[0] if len(last) else None)
            continue
        assert verdict.score == (score.max() if np.isfinite(score.max()) else None)
        first = int(np.argmax(score > 1)) if (score > 1).any() else None
        assert verdict.first_token == first


def test_policies_that_nothing_touches_are_not_evaluated() -> None:
    """One of fifty features fires: its policy is evaluated, with whatever it has to wait for."""
    scopes: tuple[Scope, ...] = ("both", "output")
    quiet = [
        make_policy(
            f"q{i}",
            And((Name("a"), Not(Name("b")))),
            {"a": Selection(f"f{1 + i % 3}", 0.5), "b": Selection("f4", 3.0)},
            window=(Window(), Window(2, 4), Window(3, None), Window(last=True))[i % 4],
            scope=scopes[i % 2],
        )
        for i in range(48)
    ]
    loud = make_policy("p", Name("a"), {"a": Selection("f0", 0.5)}, window=Window(2, 4))
    ledger = Ledger(make_watchlist([loud, *quiet]))
    text = text_of([0, 9, 9, 0, 0, 0, 0], prompt=3)
    ledger.admit("r", 3)
    ledger.ingest(forward_pass([(text, 0, text.f)]), np.array([7]))

    mine = ledger._slots.state.policies[ledger._slots["r"]]
    assert mine["idle_from"][0] == 6  # token 2, and the three that share a window with it
    assert not mine["idle_from"][1:].any()
    found = ledger.finish("r", 8)
    assert found[0].outcome == "match"
    # f2 has its low end at a quarter, and f4 below 0: at rest their shares are not 0.
    assert {v.score for v in found[1:]} == {0.0, float((0 - LOW[2]) / SPAN[2]) / 0.5}


def test_what_a_negation_or_a_mean_needs_is_always_evaluated() -> None:
    """Policies that match on quiet tokens, and means of a share that is not 0 at rest."""
    negated = make_policy("n", Not(Name("a")), {"a": Selection("f0", 0.5)})
    mean = make_policy("m", Name("a"), {"a": Selection("f4", 0.4, Over("mean", 4))})
    ledger = Ledger(make_watchlist([negated, mean]))
    text = text_of([0, 0, 0, 0], prompt=1)
    ledger.admit("r", 1)
    ledger.ingest(forward_pass([(text, 0, text.f)]), np.array([4]))

    first, second = ledger.finish("r", 5)
    assert (first.first_token, first.matched_tokens) == (0, 4)
    assert (second.first_token, second.features["f4"].max) == (3, 0.5)


def test_rules_and_features_must_agree_on_what_is_at_rest() -> None:
    """Otherwise a latent that did not fire would count as something else."""
    watchlist = make_watchlist([make_policy("p", Name("a"), {"a": Selection("f0", 0.5)})])
    with pytest.raises(ValueError, match="other shares at rest"):
        reads_of(replace(watchlist, low=watchlist.low + np.float32(1)), FEATURES)


@pytest.mark.skipif(compiled.why_not() is not None, reason="the loops are not compiled")
def test_no_step_waits_for_a_compilation() -> None:
    """Rows that come from another process are read-only or not aligned, or part of a buffer."""
    ledger = Ledger(make_watchlist(policies_of(1)))
    kinds = []
    for kind in range(4):
        text = text_of([0, 9, 0])
        text.name = f"r{kind}"
        ledger.admit(text.name, 1, roles=coded(["user"]))
        seen = forward_pass([(text, 0, text.f)])
        f = np.zeros((3, 2 * FEATURES), np.float32)[:, :FEATURES] if kind == 1 else seen.f
        if kind == 2:
            f = np.frombuffer(bytearray(b"." + f.tobytes()), np.uint8)[1:].view(np.float32)
            f = f.reshape(3, FEATURES)
            assert not f.flags.aligned
        if kind == 3:
            f = np.frombuffer(f.tobytes(), np.float32).reshape(3, FEATURES)
            assert not f.flags.writeable
        positions = seen.positions.astype(np.int32) if kind == 3 else seen.positions
        ledger.ingest(replace(seen, f=f, positions=positions), np.array([3]))
        kinds.append(len(ingest_rows.signatures))  # type: ignore[attr-defined]
    assert len(set(kinds)) == 1
