"""Cut the Python code out of an answer."""

from __future__ import annotations

import ast
import re

_FENCE = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\r?\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)


def python_code(answer: str) -> str:
    """Return the code of the first fenced block, or the whole answer if it has none.

    An answer that was cut off at its last token often ends within a statement. So last lines are
    dropped until the rest parses.

    Returns:
        Code that parses; empty if there is none.
    """
    block = _FENCE.search(answer)
    lines = (block[1] if block else answer).rstrip().split("\n")
    # Without a fence an answer may be prose, whose first line or two may parse by chance.
    while lines and not _parses("\n".join(lines)):
        lines.pop()
    code = "\n".join(lines)
    return code if _says_anything(code) else ""


def _parses(code: str) -> bool:
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _says_anything(code: str) -> bool:
    """Return whether code does more than name or quote something."""
    body = ast.parse(code).body
    return any(
        not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant | ast.Name))
        for node in body
    )
