"""Compile plain loops with numba; where numba cannot compile, the same functions run as Python.

Compiled code is cached in the first of these folders that is writable: `NUMBA_CACHE_DIR`, that of
the modules, the user's cache folder. Without any of them it is compiled at every start.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Callable, Collection, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import structlog

log = structlog.get_logger("saeguard")

LOOPS = (
    "aggregates",
    "conclude",
    "evaluate",
    "evidence",
    "host_loop",
    "read_rows",
    "step_policy",
    "tables",
)
"""The modules of this folder whose code is compiled, and what they compile in."""
_KEPT: list[Any] = []
"""Compiled functions whose code is called by its address."""

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Return a function that numba compiles at its first call, or the function itself."""
    return function if why_not() is not None else _njit(function)


@cache
def why_not() -> str | None:
    """Return why numba cannot compile on this machine; None if it can."""
    try:
        numba = _numba()
        if numba.config.DISABLE_JIT:
            return "NUMBA_DISABLE_JIT is set"
        _njit(_probe)(1)
    except Exception as error:  # noqa: BLE001 - LLVM raises many kinds
        return f"{type(error).__name__}: {error}"
    return None


@cache
def _numba() -> Any:
    """Import numba, so that vLLM can still look at every attribute of every module.

    vLLM 0.32 does so when it registers its kernels for CPUs (`vllm.triton_utils.dispatcher`), and
    llvmlite's library answers a question for `__dict__` with a function of C.
    """
    import numba  # noqa: PLC0415 - may be missing, or fail to load
    from llvmlite.binding import ffi  # noqa: PLC0415

    kind = type(ffi.lib)
    answer = kind.__getattr__

    def no_dunder(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return answer(self, name)

    kind.__getattr__ = no_dunder
    return numba


def _njit(function: Function) -> Function:
    # Nothing is allocated, so no array is counted: that would cost more than the rules do.
    made = _make(_numba().njit, function, error_model="numpy", _nrt=False)
    return cast("Function", made)


def by_address(
    function: Callable[..., None], pointers: Sequence[str], fast_math: Collection[str]
) -> Callable[..., None]:
    """Compile a loop over memory that is given by addresses; return what calls it.

    Such a call takes a microsecond less than one that looks at the types of arrays.

    Args:
        function: the loop.
        pointers: what each of its arguments points to, such as `float32`.
        fast_math: what the compiler may change, in LLVM's words.

    Raises:
        RuntimeError: the code of this module runs as Python on this machine.
        Exception: numba cannot compile the function.
    """
    reason = why_not()
    if reason is not None:
        raise RuntimeError(reason)
    numba = _numba()
    types = [numba.types.CPointer(getattr(numba, name)) for name in pointers]
    made = _make(numba.cfunc, function, numba.void(*types), fastmath=set(fast_math))
    _KEPT.append(made)
    # Addresses as numbers, since making typed pointers takes longer than a loop.
    call: Callable[..., None] = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * len(types))(
        made.address
    )
    return call


def _make(decorator: Callable[..., Any], function: Any, *given: Any, **options: Any) -> Any:
    """Let numba compile a function, and cache it in the folder of these sources."""
    config, folder = _numba().config, cache_folder()
    before = config.CACHE_DIR
    config.CACHE_DIR = before if folder is None else str(folder)
    try:
        return decorator(*given, cache=folder is not None, **options)(function)
    finally:
        config.CACHE_DIR = before


@cache
def cache_folder() -> Path | None:
    """Return a writable folder for compiled code of these very sources; None if there is none.

    numba itself looks only at the module of a function, not at those that it calls.
    """
    here = Path(__file__).parent
    digest = hashlib.sha256(b"".join((here / f"{name}.py").read_bytes() for name in LOOPS))
    given = os.environ.get("NUMBA_CACHE_DIR")
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for root in (Path(given) if given else None, here / "__pycache__", user / "saeguard"):
        folder = root and root / f"loops-{digest.hexdigest()[:16]}"
        if folder is not None and _writable(folder):
            return folder
    return None


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError:
        return False
    return True


def warn_if_slow() -> None:
    """Log a warning if the rules run as ordinary Python: verdicts are the same, and come later."""
    reason = why_not()
    if reason is not None:
        log.warning(
            "saeguard cannot compile its rules: they run as Python, a hundred times slower",
            reason=reason,
            hint="install numba for this Python, or unset NUMBA_DISABLE_JIT",
        )


def _probe(x: int) -> int:
    return x + 1
