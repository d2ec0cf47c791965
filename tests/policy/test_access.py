"""Whose policy applies."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from saeguard.policy.access import (
    UNRESTRICTED,
    Access,
    check_against,
    decide,
    key_digest,
    load_access,
)
from saeguard.policy.errors import PolicyErrors
from saeguard.policy.types import Exception_, Name, Policy, Selection
from tests.guard.watchlists import make_policy

KEYS = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("key-a", "key-b", "key-c")}
TEXT = f"""\
schema: saeguard.access/v1
tenants:
  bank: {{keys_sha256: [{KEYS["key-a"]}, {KEYS["key-b"]}]}}
  red-team: {{keys_sha256: [{KEYS["key-c"]}]}}
rules:
  - {{policies: [finance.*], tenants: [bank], how: only}}
  - {{policies: [new], tenants: [red-team], how: enforce}}
  - {{policies: [persona], models: [support-lora], how: only}}
  - {{policies: [strict], tenants: [bank], how: may_enforce}}
"""
TODAY = date(2026, 11, 24)
IDS = ("base", "finance.fraud", "new", "persona", "strict")


def policies(**exceptions: Any) -> list[Policy]:
    """Return one policy a name; only `base` and `finance.fraud` are enforced as they are."""
    made = []
    for name in IDS:
        mode: Any = "enforce" if name in {"base", "finance.fraud"} else "shadow"
        policy = make_policy(name, Name("a"), {"a": Selection("f0", 0.5)}, mode=mode)
        made.append(replace(policy, exceptions=exceptions.get(name, ())))
    return made


def access(tmp_path: Path, text: str = TEXT) -> Access:
    """Return what a file says."""
    path = tmp_path / "access.yaml"
    path.write_text(text)
    return load_access(path)


def named(flags: tuple[bool, ...]) -> set[str]:
    """Return the policies that a flag is set for."""
    return {name for name, flag in zip(IDS, flags, strict=True) if flag}


@pytest.mark.parametrize(
    ("tenant", "model", "asked", "more", "enforced"),
    [
        (None, "base-model", "", set(), {"base"}),
        ("bank", "base-model", "", {"finance.fraud"}, {"base", "finance.fraud"}),
        ("bank", "m", "strict", {"finance.fraud"}, {"base", "finance.fraud", "strict"}),
        (None, "m", "strict", set(), {"base"}),
        ("red-team", "m", "", set(), {"base", "new"}),
        (None, "support-lora", "", {"persona"}, {"base"}),
        (None, "m", "finance.fraud", set(), {"base"}),
    ],
)  # fmt: skip
def test_whose_policies_hold(
    tenant: str | None,
    model: str,
    asked: str,
    more: set[str],
    enforced: set[str],
    tmp_path: Path,
) -> None:
    """By tenant, by adapter, by what a request may ask for; asking for more does nothing."""
    decision = decide(
        policies(),
        access(tmp_path),
        tenant=tenant,
        model=model,
        asked=frozenset(filter(None, [asked])),
        may_enforce=frozenset(),
        today=TODAY,
    )
    assert named(decision.applies) == {"base", "new", "strict", *more}
    assert named(decision.enforced) == enforced
    assert not decision.waived


def test_without_a_file_every_policy_holds_for_everybody() -> None:
    """And shadow policies are enforced only where everybody may have them."""
    for asked, enforced in (
        ((), {"base", "finance.fraud"}),
        (("new",), {"base", "finance.fraud", "new"}),
    ):
        decision = decide(
            policies(), UNRESTRICTED, tenant=None, model="m", asked=frozenset(asked),
            may_enforce=frozenset({"new"}), today=TODAY,
        )  # fmt: skip
        assert named(decision.applies) == set(IDS)
        assert named(decision.enforced) == enforced


@pytest.mark.parametrize(
    ("tenant", "today", "waived"),
    [
        ("red-team", date(2026, 11, 24), True),
        ("red-team", date(2026, 11, 25), False),
        ("bank", date(2026, 11, 24), False),
        (None, date(2026, 11, 24), False),
    ],
)
def test_an_exception_waives_the_action(
    tenant: str | None, today: date, *, waived: bool, tmp_path: Path
) -> None:
    """For its tenant, up to and including its last day; the policy still holds."""
    exception = Exception_("q1", "drill", "rt@example.com", date(2026, 11, 24), "red-team")
    decision = decide(
        policies(base=(exception,)), access(tmp_path), tenant=tenant, model="m",
        asked=frozenset(), may_enforce=frozenset(), today=today,
    )  # fmt: skip
    assert decision.applies[0]
    assert decision.enforced[0] is not waived
    assert decision.waived == ({0: "q1"} if waived else {})


def test_a_key_has_a_tenant(tmp_path: Path) -> None:
    """Keys are known by their digest only."""
    found = access(tmp_path)
    assert found.tenant(key_digest("key-a")) == found.tenant(key_digest("key-b")) == "bank"
    assert found.tenant(key_digest("key-c")) == "red-team"
    assert found.tenant(key_digest("key-d")) is found.tenant(None) is found.tenant(b"") is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("tenants: [red-team]", "tenants: [redteam]", 'did you mean "red-team"? known: bank'),
        ("how: enforce", "how: relax", "not-allowed"),
        ("models: [support-lora], ", "", "needs tenants or models"),
        (KEYS["key-c"], KEYS["key-a"], "a key has one tenant"),
        (KEYS["key-c"], "key-c", "keys_sha256"),
        ("rules:", "rule:", 'did you mean "rules"?'),
    ],
)  # fmt: skip
def test_mistakes_are_told(old: str, new: str, message: str, tmp_path: Path) -> None:
    """With line and column, as in policies."""
    with pytest.raises(PolicyErrors) as caught:
        access(tmp_path, TEXT.replace(old, new))
    (first, *_) = caught.value.errors
    assert message in str(caught.value)
    assert first.line > 0


def test_names_that_nothing_has(tmp_path: Path) -> None:
    """A rule without policy, and an exception without tenant, would do nothing unnoticed."""
    found = access(tmp_path)
    check_against(found, policies())
    with pytest.raises(PolicyErrors, match=r'no policy is named "finance\.\*"'):
        check_against(found, policies()[:1])
    exception = Exception_("q1", "drill", "rt@example.com", TODAY, "blue-team")
    for there in (found, UNRESTRICTED):
        with pytest.raises(PolicyErrors, match='exception "q1" is for tenant "blue-team"'):
            check_against(there, policies(base=(exception,)))
