"""`saeguard policy fmt`: what moves, what stays, and that nothing changes its meaning."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from saeguard.policy.errors import PolicyErrors
from saeguard.policy.load import digest
from saeguard.policy_tools.formatter import laid_out
from saeguard.yaml_files.reader import read_document
from tests.fuzz.mutate import mutate
from tests.policy.example import GOOD
from tests.policy_tools.test_test_cases import CASES

P = Path("p.yaml")
SHIPPED = sorted(Path("policies").rglob("*.yaml"))

MESSY = """\
# yaml-language-server: $schema=x.json

# Ours.

# what it is for
title: a<

id: p
schema: saeguard.policy/v1   # the version


rationale: |
  one

  two<
# who
# answers
owner: b
falsepositives:
  # why

  - x
# the end
""".replace("<\n", "  \n")
"""With white space at the ends of two lines."""
TIDY = """\
# yaml-language-server: $schema=x.json
# Ours.
schema: saeguard.policy/v1   # the version
id: p
# what it is for
title: a
# who
# answers
owner: b
rationale: |
  one

  two<
falsepositives:
  # why
  - x
# the end
""".replace("<\n", "  \n")


def test_order_and_comments() -> None:
    """Keys go where the reference has them, with the comments above them."""
    assert laid_out(P, MESSY.encode()) == TIDY


def test_once_is_enough() -> None:
    """What is laid out stays as it is, byte order marks and carriage returns aside."""
    assert laid_out(P, TIDY.encode()) == TIDY
    assert laid_out(P, b"\xef\xbb\xbf" + TIDY.replace("\n", "\r\n").encode()) == TIDY


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_shipped(path: Path) -> None:
    """The library is laid out."""
    assert laid_out(path, path.read_bytes()) == path.read_text()


def test_tests_have_an_order_of_their_own() -> None:
    """A test file is laid out by its own keys."""
    head, cases = CASES.split("cases:\n")
    swapped = f"cases:\n{cases}{head}"

    assert laid_out(Path("p.test.yaml"), swapped.encode()) == CASES


@pytest.mark.parametrize(
    "text",
    [
        "{id: a, schema: b}\n",
        'title: "one\n\n  two"\nid: a\n',
        "rationale: |+\n  one\n\n\nid: a\n",
        "id: a\ntitle: one\n\n  two\n",
    ],
)
def test_meaning_comes_first(text: str) -> None:
    """White space that is content stays."""
    before = read_document(P, text.encode())
    assert before.errors == ()

    after = read_document(P, laid_out(P, text.encode()).encode())

    assert digest(after.data) == digest(before.data)


def test_not_yaml() -> None:
    """A file that cannot be read is told as `check` tells it."""
    with pytest.raises(PolicyErrors) as caught:
        laid_out(P, b"id: [")

    assert [error.code for error in caught.value.errors] == ["yaml-syntax"]


@settings(deadline=None, max_examples=300)
@given(st.sampled_from([GOOD, MESSY, *(p.read_text() for p in SHIPPED)]), st.randoms(), st.data())
def test_never_changes_what_a_file_says(
    text: str, chance: random.Random, data: st.DataObject
) -> None:
    """Whatever is written, it is refused, or means the same and is laid out for good."""
    raw = mutate(text.encode(), chance) if data.draw(st.booleans()) else text.encode()
    before = read_document(P, raw)
    if before.errors:
        with pytest.raises(PolicyErrors):
            laid_out(P, raw)
        return

    once = laid_out(P, raw)

    after = read_document(P, once.encode())
    assert after.errors == ()
    assert digest(after.data) == digest(before.data)
    assert laid_out(P, once.encode()) == once


@settings(deadline=None, max_examples=50)
@given(st.randoms())
def test_any_order_becomes_the_same(chance: random.Random) -> None:
    """The same keys in any order give the same file."""
    data = yaml.safe_load(GOOD)
    keys = list(data)

    def written() -> bytes:
        chance.shuffle(keys)
        return yaml.safe_dump({key: data[key] for key in keys}, sort_keys=False).encode()

    assert laid_out(P, written()) == laid_out(P, written())
