"""Whatever a file holds, reading it gives a policy or errors that point into it."""

from __future__ import annotations

import random
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saeguard.policy.load import digest
from tests.fuzz.mutate import MAX_BYTES, mutate
from tests.fuzz.target import read as read_in_time
from tests.policy.example import GOOD, policy, read_policy

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=20_000, deadline=None, suppress_health_check=list(HealthCheck))

PIECES = """
    &a |*a|!!str |!|<<: |? |: |- |[|]|{|}|'|"|%|#|no|~|1e9|0x4|---|...|>-|not |(|)| of |any|and
    999999999999999999999|é|😀
"""
SNIPPETS = st.sampled_from([*PIECES.strip().split("|"), *"|\\\t\n\0\u2028\ufeff", "\n---\n"])
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["id", "mode", "detect", "condition", "for", "clamp", "to", "above"])
            | st.text(max_size=5),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Return the good policy with a few pieces cut out, doubled or put in."""
    text = GOOD
    for _ in range(draw(st.integers(1, 4))):
        a = draw(st.integers(0, len(text)))
        b = min(len(text), a + draw(st.integers(0, 30)))
        piece = draw(SNIPPETS | st.just(text[a:b] * 2) | st.text(max_size=3))
        text = text[:a] + piece + text[b:]
    return text.encode("utf-8", "surrogatepass")


@st.composite
def replaced(draw: st.DrawFn) -> bytes:
    """Return the good policy with one value, at any depth, replaced by anything."""
    data = yaml.safe_load(GOOD)
    inside = data
    while True:
        key = draw(st.sampled_from(list(inside) if isinstance(inside, dict) else [0]))
        below = inside[key]
        if not isinstance(below, dict | list) or not below or draw(st.booleans()):
            break
        inside = below
    inside[key] = draw(PLAIN)
    return yaml.safe_dump(data, allow_unicode=True, sort_keys=False).encode()


SEEDS = [
    path.read_bytes()
    for path in sorted(Path("policies").rglob("*.yaml"))
    if path.stat().st_size <= MAX_BYTES
]


@st.composite
def spoilt(draw: st.DrawFn) -> bytes:
    """Return a shipped policy or test file, spoilt as `make fuzz` spoils them."""
    return mutate(draw(st.sampled_from(SEEDS)), draw(st.randoms(use_true_random=False)))


ANYTHING = (
    spoilt()
    | st.binary(max_size=400)
    | damaged()
    | replaced()
    | PLAIN.map(yaml.safe_dump).map(str.encode)
)


def survives(raw: bytes) -> None:
    """Read `raw` as a policy and as its tests; errors have to be whole, and come in time."""
    with TemporaryDirectory() as name:
        read_in_time(Path(name) / "p.yaml", raw, policy(Path(name)))


@QUICK
@given(ANYTHING)
def test_nothing_but_errors(raw: bytes) -> None:
    """No file makes the loader raise or point outside the file."""
    survives(raw)


@pytest.mark.slow
@LONG
@given(ANYTHING)
def test_nothing_but_errors_long(raw: bytes) -> None:
    """No file makes the loader raise or point outside the file, at length."""
    survives(raw)


@QUICK
@given(st.randoms(use_true_random=False))
def test_digest_sees_content_only(source: random.Random) -> None:
    """Order of keys, quoting, line width and comments do not change the digest."""
    data = yaml.safe_load(GOOD)
    keys = list(data)
    source.shuffle(keys)
    text = yaml.safe_dump(
        {key: data[key] for key in keys}, sort_keys=False, width=source.randint(20, 200)
    )
    with TemporaryDirectory() as name:
        before = policy(Path(name))
        path = Path(name) / "q.yaml"
        path.write_text(f"# {source.random()}\n{text}")
        after, errors = read_policy(path)

    assert errors == []
    assert after is not None
    assert after.digest == before.digest == digest(data)
