"""Check that the installed vLLM has every internal that the guard relies on.

The internals are declared beside the code that uses them; see `saeguard.vllm.patches`. The check
imports each name. It compares the parameters of each callable with the arguments that the guard
gives. And it looks in each class for the attributes that the guard reads from instances: they must
be declared, computed or assigned. `CONTRACT.md` lists the internals for people.
"""

from __future__ import annotations

import dis
import importlib
import inspect
from collections.abc import Iterable, Sequence
from types import FunctionType
from typing import Any

from saeguard.errors import CannotRunError
from saeguard.vllm.patches import INTERNALS, Internal


class ContractError(CannotRunError):
    """This version of vLLM lacks an internal that the guard relies on."""


def check(internals: Iterable[Internal] | None = None) -> None:
    """Check the installed vLLM against the registered internals, or those given.

    Raises:
        ContractError: names the vLLM version and every missing internal.
    """
    found = map(missing, INTERNALS if internals is None else internals)
    lacking = [what for what in found if what is not None]
    if lacking:
        import vllm

        listed = "\n  ".join(dict.fromkeys(lacking))
        raise ContractError(
            f"saeguard does not fit vLLM {vllm.__version__}; missing:\n  {listed}\n"
            "Install a version listed in saeguard/vllm/CONTRACT.md, or remove `saeguard` from "
            "--additional-config to serve unguarded."
        )


def missing(internal: Internal) -> str | None:
    """Return the message about what the installed vLLM lacks of one internal, None if complete."""
    try:
        target: Any = importlib.import_module(internal.module)
    except ImportError as error:
        return f"{internal.module} cannot be imported ({error})"
    for part in internal.name.split("."):
        if not hasattr(target, part):
            return absent(internal)
        target = getattr(target, part)
    if internal.leading or internal.named:
        return wrong_parameters(internal, list(inspect.signature(target).parameters))
    return lacking_fields(internal, [f for f in wanted(internal) if not _has(target, f)])


# --- shared with the check of source text -------------------------------------------------------


def absent(internal: Internal) -> str:
    """Return the message about a name that does not exist."""
    return f"{internal.module}.{internal.name} does not exist"


def wrong_parameters(internal: Internal, found: Sequence[str]) -> str | None:
    """Return the message about parameters that a callable lacks or orders otherwise, or None."""
    where = f"{internal.module}.{internal.name}"
    found = [p for p in found if p not in {"self", "cls"}]
    lacking = [p for p in (*internal.leading, *internal.named) if p not in found]
    if lacking:
        return f"{where} has no parameter {', '.join(lacking)}; it takes ({', '.join(found)})"
    if tuple(found[: len(internal.leading)]) != internal.leading:
        expected = ", ".join(internal.leading)
        return f"{where} takes ({', '.join(found)}), expected the first to be ({expected})"
    return None


def wanted(internal: Internal) -> tuple[str, ...]:
    """Return every field to look for, alternatives included."""
    return (*internal.fields, *(field for option in internal.either for field in option))


def lacking_fields(internal: Internal, absent_fields: Sequence[str]) -> str | None:
    """Return the message about fields that a class lacks, None if it lacks none.

    It must have every field, and all of at least one group of alternatives.
    """
    lacking = [f for f in internal.fields if f in absent_fields]
    if internal.either and all(set(option) & set(absent_fields) for option in internal.either):
        lacking.append(" or ".join("+".join(option) for option in internal.either))
    if not lacking:
        return None
    return f"{internal.module}.{internal.name} has no {', '.join(lacking)}"


# --- looking at classes -------------------------------------------------------------------------


def _has(cls: type, field: str) -> bool:
    """Return whether a class or a base declares, computes or assigns a field of its instances."""
    declared = {
        *getattr(cls, "__dataclass_fields__", ()),
        *getattr(cls, "__pydantic_fields__", ()),
    }
    return (
        hasattr(cls, field)
        or field in declared
        or any(_assigns(base, field) for base in cls.__mro__)
    )


def _assigns(cls: type, field: str) -> bool:
    """Return whether a method of a class assigns the field."""
    methods = (inspect.unwrap(m) for m in vars(cls).values() if callable(m))
    return any(
        i.opname == "STORE_ATTR" and i.argval == field
        for m in methods
        if isinstance(m, FunctionType) and field in m.__code__.co_names
        for i in dis.get_instructions(m)
    )
