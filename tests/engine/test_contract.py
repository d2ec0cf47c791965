"""The contract holds for the installed vLLM, notices what it lacks, and is written down."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from saeguard.vllm import contract
from saeguard.vllm.contract import CLAUSES, Clause, ContractError
from saeguard.vllm.doctor import SUPPORTED

WRITTEN = Path(contract.__file__).with_name("CONTRACT.md")


@dataclass
class Carrier:
    """A class that holds a field in each way that the contract knows."""

    declared: int

    def __post_init__(self) -> None:
        """Set a field without declaring it."""
        self.assigned = self.declared

    @property
    def computed(self) -> int:
        """A property."""
        return self.declared

    def call(self, first: int, second: int, *, named: int = 0) -> int:
        """A method."""
        return first + second + named + self.declared


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that holds `Carrier`."""
    module = ModuleType("stand_in_for_vllm")
    module.Carrier = Carrier  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.__name__


def test_the_installed_vllm_has_it_all() -> None:
    """No clause is missing in the version under test."""
    contract.check()


def test_what_is_there_is_found(stand_in: str) -> None:
    """Fields may be declared, computed or assigned by a method."""
    fields = ("declared", "computed", "assigned", "call")
    assert contract.missing(Clause(stand_in, "Carrier", fields=fields)) is None
    called = Clause(stand_in, "Carrier.call", ("first", "second"), keywords=("named",))
    assert contract.missing(called) is None


@pytest.mark.parametrize(
    ("name", "more", "expected"),
    [
        ("Nobody", {}, "Nobody is not there"),
        ("Carrier.nothing", {}, "Carrier.nothing is not there"),
        ("Carrier", {"fields": ("declared", "lost")}, "Carrier has no lost"),
        ("Carrier.call", {"parameters": ("first", "third")}, "no parameter third"),
        ("Carrier.call", {"keywords": ("nameless",)}, "no parameter nameless"),
        ("Carrier.call", {"parameters": ("second",)}, "expected to begin with (second)"),
    ],
)
def test_what_is_missing_is_named(
    stand_in: str, name: str, more: dict[str, tuple[str, ...]], expected: str
) -> None:
    """Each kind of absence says where and what, and the error says in which version."""
    import vllm

    clause = Clause(stand_in, name, **more)
    assert expected in str(contract.missing(clause))
    with pytest.raises(ContractError) as raised:
        contract.check([clause])
    assert vllm.__version__ in str(raised.value)
    assert f"{stand_in}.{name}" in str(raised.value)


def test_the_written_contract_names_every_clause() -> None:
    """CONTRACT.md lists each module member, parameter and field, and each version tested."""
    text = WRITTEN.read_text()
    for clause in CLAUSES:
        for name in (clause.name, *clause.fields):
            assert name.rsplit(".", 1)[-1] in text, (clause.module, name)
    for minor in SUPPORTED:
        assert f"**{minor}" in text
