"""What is traced into a graph has a version, which vLLM's compile cache goes by."""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch

from saeguard.guard import tap

TRACED = {1: "a9c58c69447e186c"}
"""By version: digest of the op's schema and of the code that tracing runs."""


def digest(schema: str, *traced: str) -> str:
    """Return a digest of the op's schema and of sources, whatever their comments say."""
    return hashlib.sha256("\n".join([schema, *map(code, traced)]).encode()).hexdigest()[:16]


def code(source: str) -> str:
    """Return a function's source without comments, docstring and layout."""
    tree = ast.parse(textwrap.dedent(source))
    [function] = tree.body
    assert isinstance(function, ast.FunctionDef)
    if ast.get_docstring(function) is not None:
        function.body[0] = ast.Pass()
    return ast.unparse(tree)


def traced() -> list[str]:
    """Return the sources of what tracing runs."""
    functions: list[Callable[..., Any]] = [tap.tap_output, tap._fake, tap.tap_hook]
    return [inspect.getsource(function) for function in functions]


def test_the_version_rises_with_what_is_traced() -> None:
    """A changed schema or call needs a new `TRACE_VERSION`: add it here with its digest."""
    schema = str(torch.ops.saeguard.tap.default._schema)
    assert TRACED[max(TRACED)] == digest(schema, *traced())
    assert max(TRACED) == tap.TRACE_VERSION
    assert len(set(TRACED.values())) == len(TRACED)


def test_comments_do_not_count() -> None:
    """A comment, a docstring or another layout changes nothing; another call does."""
    output, fake, _ = traced()
    commented = output.replace("    return output", "    # why\n\n    return (output)")
    assert commented != output
    assert digest("", commented, fake) == digest("", output, fake)
    called = output.replace("(output, None, layer)", "(output, output, layer)")
    assert called != output
    assert digest("", called, fake) != digest("", output, fake)


def test_the_fingerprint_follows_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version is another fingerprint, so that no old graph is taken from the cache."""
    before = tap.fingerprint()
    assert before == tap.fingerprint()
    monkeypatch.setattr(tap, "TRACE_VERSION", tap.TRACE_VERSION + 1)
    assert tap.fingerprint() != before
