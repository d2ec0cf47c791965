"""Watch SAE latents inside vLLM while it serves, and act by policy.

The names below are for programs that judge texts themselves (docs/embedding.md); each is imported
when it is first used, so that `import saeguard` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saeguard.api import (
        build_watchlist,
        judge,
        judge_recording,
        load_feature_set,
        load_model,
        load_policies,
        load_watchlist,
        scan,
    )
    from saeguard.errors import SaeguardError
    from saeguard.guard.verdict import Verdict

__version__ = "0.1.0"

__all__ = [
    "SaeguardError",
    "Verdict",
    "build_watchlist",
    "judge",
    "judge_recording",
    "load_feature_set",
    "load_model",
    "load_policies",
    "load_watchlist",
    "scan",
]

_ELSEWHERE = {"SaeguardError": "saeguard.errors", "Verdict": "saeguard.guard.verdict"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_ELSEWHERE.get(name, "saeguard.api")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
