"""Register what the guard patches and reads in vLLM, and install the patches.

A wrapper is defined in the module that needs it, and names the method that it wraps:

    @patch("vllm.v1.core.sched.scheduler:Scheduler.add_request", why="...")
    def add_request(original: Original, scheduler: Any, request: Any) -> Any:
        ...
        return original()

Its parameters after the first two are named after parameters of vLLM's method, and hold what vLLM
passes for them, by position or by name. `original()` calls the method exactly as vLLM did;
`original(request=other)` replaces that argument. All other arguments pass through untouched,
because versions of vLLM differ in them. A wrapper calls the method; it never replaces it.

A module declares at its top what else it relies on, with `reads`, `calls` and `assumes`. The
declarations are the contract: `saeguard.vllm.contract` checks the installed vLLM against them,
`saeguard.vllm.contract_source` checks the source text of another, and `CONTRACT.md` is written from
them.
"""

from __future__ import annotations

import inspect
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias, TypeVar

import wrapt

from saeguard.errors import SaeguardError
from saeguard.start_report import failed

Original: TypeAlias = Callable[..., Any]
"""Calls the patched method, with the arguments that are given by name in place of vLLM's."""
Wrapper = TypeVar("Wrapper", bound=Callable[..., Any])

CALLED_WITH = 2
"""Parameters of a wrapper that are not vLLM's: `original` and the instance."""


@dataclass(frozen=True, slots=True)
class Internal:
    """One of vLLM's internals: what the guard uses of it, in which module, and why."""

    target: str
    """`module:name`, where the name may be nested."""
    user: str
    """The guard's module that relies on it."""
    why: str
    differs: str = ""
    """What differs between versions of vLLM."""
    fields: tuple[str, ...] = ()
    """Of a class: attributes of its instances."""
    either: tuple[tuple[str, ...], ...] = ()
    """Of a class: alternative groups of attributes; its instances have all of at least one."""
    leading: tuple[str, ...] = ()
    """Of a callable: its first parameters, `self` aside, in this order."""
    named: tuple[str, ...] = ()
    """Of a callable: parameters at any position."""
    wrapper: str | None = None
    """Name of the function in `user` that wraps it."""

    @property
    def module(self) -> str:
        """Return vLLM's module."""
        return self.target.split(":")[0]

    @property
    def name(self) -> str:
        """Return the name in the module, nested names joined by dots."""
        return self.target.split(":")[1]


class Assumption(NamedTuple):
    """A property of vLLM that the guard relies on and that only a running engine can show."""

    what: str
    user: str
    why: str
    differs: str


INTERNALS: list[Internal] = []
ASSUMPTIONS: list[Assumption] = []


def patch(*targets: str, why: str, differs: str = "") -> Callable[[Wrapper], Wrapper]:
    """Register a wrapper of vLLM's methods.

    Args:
        targets: `module:Class.method`, each.
        why: what the guard does there.
        differs: what differs between versions of vLLM.
    """

    def register(wrapper: Wrapper) -> Wrapper:
        parameters = list(inspect.signature(wrapper).parameters.values())[CALLED_WITH:]
        named = tuple(p.name for p in parameters if p.default is p.empty)
        INTERNALS.extend(
            Internal(
                target,
                wrapper.__module__,
                why,
                differs,
                named=named,
                wrapper=wrapper.__name__,
            )
            for target in targets
        )
        return wrapper

    return register


def reads(
    target: str,
    *fields: str,
    why: str,
    either: tuple[tuple[str, ...], ...] = (),
    differs: str = "",
) -> None:
    """Declare a class of vLLM's and which fields of its instances the calling module reads or sets.

    Args:
        target: `module:name`; any object if no field is named.
        fields: attributes, properties and methods.
        why: what they are used for.
        either: alternative groups of fields; all of at least one group must exist.
        differs: what differs between versions of vLLM.
    """
    INTERNALS.append(Internal(target, _user(), why, differs, fields=fields, either=either))


def calls(
    target: str, *leading: str, why: str, named: tuple[str, ...] = (), differs: str = ""
) -> None:
    """Declare a callable of vLLM's and the parameters that the calling module gives.

    Args:
        target: `module:name`.
        leading: given by position, in this order.
        why: what it is called for.
        named: given by name.
        differs: what differs between versions of vLLM.
    """
    INTERNALS.append(Internal(target, _user(), why, differs, leading=leading, named=named))


def assumes(what: str, *, why: str, differs: str = "") -> None:
    """Declare a property of vLLM that no check of names and parameters can show."""
    ASSUMPTIONS.append(Assumption(what, _user(), why, differs))


def _user() -> str:
    return str(sys._getframe(2).f_globals["__name__"])


_installed = False


def install() -> bool:
    """Install every registered wrapper once; later calls do nothing and return False.

    A module of vLLM's that is not imported yet is patched when it is, so that a process imports
    only what it uses.
    """
    global _installed  # noqa: PLW0603 - plugins are loaded several times in a process
    if _installed:
        return False
    _installed = True
    by_module: dict[str, list[Internal]] = defaultdict(list)
    for internal in INTERNALS:
        if internal.wrapper is not None:
            by_module[internal.module].append(internal)
    for module, internals in by_module.items():
        wrapt.register_post_import_hook(partial(_patch_module, internals), module)
    return True


def _patch_module(internals: list[Internal], module: ModuleType) -> None:
    """Patch a module that was just imported.

    A missing method is skipped. If the guard is configured, `contract.check` then refuses to start;
    a server without the guard must not be affected.
    """
    for internal in internals:
        assert internal.wrapper is not None
        # Looked up now, so that a test can break a wrapper by assigning to its name.
        wrapper = getattr(sys.modules[internal.user], internal.wrapper)
        try:
            target = attrgetter(internal.name)(module)
        except AttributeError:
            continue
        places = _places(target, wrapper)
        if places is not None:
            wrapt.wrap_function_wrapper(module, internal.name, _around(wrapper, places))


class _Place(NamedTuple):
    """Position and default of one of vLLM's parameters that a wrapper takes."""

    name: str
    position: int
    """Index after `self`; larger than that of any argument if the parameter is keyword-only."""
    default: Any


def _places(target: Any, wrapper: Callable[..., Any]) -> tuple[_Place, ...] | None:
    """Find a wrapper's parameters among those of vLLM's method; None if one is missing."""
    has = [p for p in inspect.signature(target).parameters.values() if p.name != "self"]
    by_position = [p.name for p in has if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    by_name = {p.name: p for p in has}
    places = []
    for parameter in list(inspect.signature(wrapper).parameters.values())[CALLED_WITH:]:
        name = parameter.name
        if name not in by_name and parameter.default is parameter.empty:
            return None
        position = by_position.index(name) if name in by_position else sys.maxsize
        found = by_name.get(name, parameter).default
        places.append(_Place(name, position, None if found is parameter.empty else found))
    return tuple(places)


def _around(wrapper: Callable[..., Any], places: tuple[_Place, ...]) -> Callable[..., Any]:
    """Return a function that wrapt can call and that calls the wrapper."""
    positions = {place.name: place.position for place in places}
    # vLLM calls some methods for every request in every step, mostly with just these arguments.
    leads = list(positions.values()) == list(range(len(places)))

    def call(
        wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        def original(**changed: Any) -> Any:
            if changed:
                return _call_changed(wrapped, args, kwargs, changed, positions)
            return wrapped(*args, **kwargs)

        given = len(args)
        try:
            if leads and given == len(places):
                return wrapper(original, instance, *args)
            values = [
                args[position] if position < given else kwargs.get(name, default)
                for name, position, default in places
            ]
            return wrapper(original, instance, *values)
        except SaeguardError as error:
            failed(error)
            raise

    return call


def _call_changed(
    wrapped: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    changed: dict[str, Any],
    positions: dict[str, int],
) -> Any:
    """Call vLLM's method with some arguments replaced, each passed as vLLM passed it."""
    by_position, by_name = list(args), dict(kwargs)
    for name, value in changed.items():
        position = positions[name]
        if position < len(args):
            by_position[position] = value
        else:
            by_name[name] = value
    return wrapped(*by_position, **by_name)
