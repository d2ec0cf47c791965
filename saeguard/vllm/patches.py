"""Put the wrappers of the contract around vLLM's methods, as each module is imported."""

from __future__ import annotations

import importlib
from collections import defaultdict
from functools import partial
from typing import Any

import structlog  # noqa: F401 - what the guard needs later must be there now, or nothing starts
import wrapt

from saeguard.guard import ledger, tap  # noqa: F401 - likewise
from saeguard.vllm import settings  # noqa: F401 - likewise
from saeguard.vllm.contract import CLAUSES, Clause, missing

_installed = False


def install() -> None:
    """Install every wrapper once; later calls do nothing.

    A module that is not imported yet is wrapped when it is, so that processes load only what
    they use.
    """
    global _installed  # noqa: PLW0603 - plugins are loaded several times in a process
    if _installed:
        return
    _installed = True
    by_module: dict[str, list[Clause]] = defaultdict(list)
    for clause in CLAUSES:
        if clause.wrapper is not None:
            by_module[clause.module].append(clause)
    for module, clauses in by_module.items():
        wrapt.register_post_import_hook(partial(_wrap, clauses), module)


def _wrap(clauses: list[Clause], _module: Any) -> None:
    for clause in clauses:
        if missing(clause) is not None:
            continue  # a configured server runs `contract.check`, others must not suffer
        assert clause.wrapper is not None
        name, function = clause.wrapper.split(":")
        wrapper = getattr(importlib.import_module(f"saeguard.vllm.{name}"), function)
        wrapt.wrap_function_wrapper(clause.module, clause.name, wrapper)
