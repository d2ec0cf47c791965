"""The contract holds for the installed vLLM, notices what it lacks, and is written down."""

from __future__ import annotations

import shutil
import sys
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from saeguard.vllm import contract, contract_page, patches
from saeguard.vllm.contract import ContractError
from saeguard.vllm.contract_source import SourceError, missing_from, open_source, version_of
from saeguard.vllm.patches import INTERNALS, Internal
from saeguard.vllm.plugin import load_patches

load_patches()


@dataclass
class Carrier:
    """A class that holds a field in each way that the contract knows."""

    declared: int

    def __post_init__(self) -> None:
        """Set fields without declaring them."""
        self.assigned, (self.first_of_two, _) = self.declared, (1, 2)

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


def internal(target: str, **what: Any) -> Internal:
    """Return an internal that a test relies on."""
    return Internal(target, __name__, "a test", **what)


def test_the_installed_vllm_has_it_all() -> None:
    """No internal is missing in the version under test."""
    assert len(INTERNALS) > 80
    contract.check()


def test_what_is_there_is_found(stand_in: str) -> None:
    """Fields may be declared, computed or assigned by a method."""
    fields = ("declared", "computed", "assigned", "first_of_two", "call")
    assert contract.missing(internal(f"{stand_in}:Carrier", fields=fields)) is None
    called = internal(f"{stand_in}:Carrier.call", leading=("first", "second"), named=("named",))
    assert contract.missing(called) is None
    either = (("lost", "declared"), ("assigned",))
    assert contract.missing(internal(f"{stand_in}:Carrier", either=either)) is None


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("Nobody", {}, "Nobody does not exist"),
    ("Carrier.nothing", {}, "Carrier.nothing does not exist"),
    ("Carrier", {"fields": ("declared", "lost")}, "Carrier has no lost"),
    ("Carrier", {"either": (("declared", "lost"), ("gone",))}, "has no declared+lost or gone"),
    ("Carrier.call", {"leading": ("first", "third")}, "no parameter third"),
    ("Carrier.call", {"named": ("nameless",)}, "no parameter nameless"),
    ("Carrier.call", {"leading": ("second",)}, "expected the first to be (second)"),
]


@pytest.mark.parametrize(("name", "what", "expected"), WRONG)
def test_what_is_missing_is_named(
    stand_in: str, name: str, what: dict[str, Any], expected: str
) -> None:
    """Each kind of absence says where and what, and the error says in which version."""
    import vllm

    wanted = internal(f"{stand_in}:{name}", **what)
    assert expected in str(contract.missing(wanted))
    with pytest.raises(ContractError) as raised:
        contract.check([wanted])
    assert vllm.__version__ in str(raised.value)
    assert f"{stand_in}.{name}" in str(raised.value)


def test_the_page_is_up_to_date() -> None:
    """CONTRACT.md is what `make contract` writes."""
    assert contract_page.PAGE.read_text(encoding="utf-8") == contract_page.page()


# --- patches ------------------------------------------------------------------------------------


class Engine:
    """Stands for a class of vLLM's."""

    def add(self, request: str, other: int = 1, *, wave: int = 2) -> tuple[str, int, int]:
        """Return what it was given."""
        return request, other, wave


def patched(wrapper: Any) -> Any:
    """Return `Engine.add` with a wrapper around it, as `install` puts it there."""
    places = patches._places(Engine.add, wrapper)
    assert places is not None
    call = patches._around(wrapper, places)

    def add(*args: Any, **kwargs: Any) -> Any:
        engine = Engine()
        return call(engine.add, engine, args, kwargs)

    return add


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        (("r",), {}, ("r!", 1, 2)),
        ((), {"request": "r", "wave": 5}, ("r!", 1, 5)),
        (("r", 7), {}, ("r!", 7, 2)),
    ],
)
def test_arguments_are_bound_by_name(
    args: tuple[Any, ...], kwargs: dict[str, Any], expected: Any
) -> None:
    """A wrapper gets and replaces an argument however it is passed; others pass through."""

    def wrapper(original: patches.Original, _engine: Any, request: str) -> Any:
        return original(request=f"{request}!")

    assert patched(wrapper)(*args, **kwargs) == expected


def test_defaults_and_keywords() -> None:
    """An argument that is not passed has vLLM's default, and can be replaced by name."""
    seen = []

    def wrapper(original: patches.Original, _engine: Any, other: int, wave: int) -> Any:
        seen.append((other, wave))
        return original(), original(wave=9, other=8)

    assert patched(wrapper)("r") == (("r", 1, 2), ("r", 8, 9))
    assert seen == [(1, 2)]


def test_a_wrapper_of_a_lost_parameter_is_not_installed() -> None:
    """A vLLM without the parameter is left alone, unless the wrapper can do without it."""

    def needs(original: patches.Original, _engine: Any, lost: int) -> Any:
        return original(lost=lost)

    def copes(original: patches.Original, _engine: Any, lost: int = 3) -> Any:
        return original(), lost

    assert patches._places(Engine.add, needs) is None
    assert patched(copes)("r") == (("r", 1, 2), 3)


# --- source text --------------------------------------------------------------------------------

SOURCE = {
    "vllm/__init__.py": "",
    "vllm/_version.py": "__version__ = version = '9.9.9'\n",
    "vllm/package/__init__.py": "from .carrier import Inner as Carrier\nfrom .other import *\n",
    "vllm/package/carrier.py": """
from vllm.package.base import Base
if True:
    class Inner(Base):
        declared: int
        class Nested:
            NONE = 0
        def call(self, first, second, *, named=0):
            for self.looped in (): pass
        async def later(self, /, one): ...
""",
    "vllm/package/base.py": """
import abc
class Base(abc.ABC):
    def __init__(self):
        self.assigned, (self.first_of_two, other) = 1, (2, 3)
        other.elsewhere: int = 4
    @property
    def computed(self): ...
""",
    "vllm/package/other.py": """
def helper(key): ...
alias = helper
class Record:
    one: int
    two: int = 0
""",
}

THERE: list[tuple[str, dict[str, Any]]] = [
    ("Carrier", {"fields": ("declared", "assigned", "first_of_two", "computed", "looped")}),
    ("Carrier", {"either": (("gone",), ("declared", "call"))}),
    ("Carrier.call", {"leading": ("first", "second"), "named": ("named",)}),
    ("Carrier.later", {"leading": ("one",)}),
    ("Carrier.Nested.NONE", {}),
    ("alias", {"leading": ("key",)}),
    ("Record", {"named": ("two", "one"), "leading": ("one",)}),
]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small vLLM."""
    for name, text in SOURCE.items():
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text(text)
    return tmp_path / "tree"


@pytest.mark.parametrize("form", ["folder", "package", "wheel"])
def test_source_is_read(tree: Path, form: str) -> None:
    """A wheel, its folder and the package's folder have the same names and version."""
    path = {"folder": tree, "package": tree / "vllm"}.get(form)
    if path is None:
        path = tree.parent / "vllm-9.9.9-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            for name, text in SOURCE.items():
                wheel.writestr(name, text)
    source = open_source(path)
    assert version_of(source) == "9.9.9"
    wanted = [internal(f"vllm.package:{name}", **what) for name, what in THERE]
    assert missing_from(source, wanted) == []


@pytest.mark.parametrize(("name", "what", "expected"), WRONG)
def test_source_names_what_is_missing(
    tree: Path, name: str, what: dict[str, Any], expected: str
) -> None:
    """The messages are those of the installed check."""
    wanted = internal(f"vllm.package:{name}", **what)
    found = missing_from(open_source(tree), [wanted])
    assert len(found) == 1
    assert expected in found[0]


def test_a_path_without_vllm_is_refused(tmp_path: Path) -> None:
    """The message says what is expected there."""
    with pytest.raises(SourceError, match="no package `vllm` found; expected a vLLM wheel"):
        open_source(tmp_path)


def installed() -> Path:
    """Return the folder of the installed vLLM."""
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def test_the_source_of_the_installed_vllm_has_it_all() -> None:
    """The check of source text agrees with the check of what is imported."""
    assert missing_from(open_source(installed())) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        (
            "v1/core/sched/scheduler.py",
            "def _update_request_with_output(",
            "def _update_request(",
            "Scheduler._update_request_with_output does not exist",
        ),
        (
            "v1/core/sched/scheduler.py",
            "def add_request(self, request:",
            "def add_request(self, req:",
            "Scheduler.add_request has no parameter request; it takes (req)",
        ),
        (
            "v1/engine/core.py",
            "def add_request(self, request: Request, request_wave: int = 0",
            "def add_request(self, request_wave: int, request: Request",
            "expected the first to be (request, request_wave)",
        ),
        (
            "v1/request.py",
            "self.num_stale_output_tokens",
            "self.num_dropped_output_tokens",
            "Request has no num_stale_output_tokens+drop_stale_output or async_tokens_to_discard",
        ),
        (
            "v1/engine/__init__.py",
            "kv_transfer_params:",
            "kv_params:",
            "EngineCoreOutput has no kv_transfer_params",
        ),
    ],
)
def test_a_change_of_vllm_is_named(
    tmp_path: Path, file: str, old: str, new: str, expected: str
) -> None:
    """A copy of the installed vLLM, with one thing renamed or moved."""
    shutil.copytree(
        installed(),
        tmp_path / "vllm",
        ignore=lambda folder, names: [
            n for n in names if not n.endswith(".py") and not (Path(folder) / n).is_dir()
        ],
    )
    text = (tmp_path / "vllm" / file).read_text()
    assert old in text
    (tmp_path / "vllm" / file).write_text(text.replace(old, new))
    found = missing_from(open_source(tmp_path))
    assert len(found) == 1
    assert expected in found[0]
