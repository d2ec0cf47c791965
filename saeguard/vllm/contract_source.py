"""Check the contract against the source text of a vLLM that is not installed.

A wheel or a folder is read as text and parsed with `ast`; nothing in it is imported or run. So a
new release can be checked anywhere, whatever GPU or torch it asks for. Definitions are followed
through re-exports, aliases and base classes. What the guard relies on outside vLLM's own package
(Starlette) is looked for only if the source holds it.
"""

from __future__ import annotations

import ast
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from saeguard.errors import InputError
from saeguard.vllm import contract
from saeguard.vllm.patches import INTERNALS, Internal

FURTHEST = 20
"""Most re-exports and aliases that are followed from a name to its definition."""


class SourceError(InputError):
    """A path is neither a vLLM wheel nor a folder that holds the package `vllm`."""


class Definition(NamedTuple):
    """A name's definition, and the module that contains it."""

    node: ast.AST
    module: str


@dataclass(slots=True)
class Source:
    """The Python modules below one wheel or folder."""

    path: Path
    text_of: Callable[[str], str | None]
    """Returns a file by its path inside the wheel or folder, None if the file is missing."""
    parsed: dict[str, tuple[ast.Module, bool] | None] = field(default_factory=dict)
    """Modules parsed before, by name; whether each is a package."""


def open_source(path: Path) -> Source:
    """Open a wheel, a folder that holds the package `vllm`, or that package's own folder.

    Raises:
        SourceError: it is something else.
    """
    if path.is_file() and zipfile.is_zipfile(path):
        archive = zipfile.ZipFile(path)
        names = frozenset(archive.namelist())
        source = Source(path, lambda name: archive.read(name).decode() if name in names else None)
    else:
        root = path.parent if path.name == "vllm" and (path / "__init__.py").is_file() else path

        def text_of(name: str) -> str | None:
            file = root / name
            return file.read_text(encoding="utf-8") if file.is_file() else None

        source = Source(path, text_of)
    if _module(source, "vllm") is None:
        raise SourceError(
            f"{path}: no package `vllm` found; expected a vLLM wheel (.whl), an unpacked one, or a "
            "site-packages folder with vLLM in it"
        )
    return source


def version_of(source: Source) -> str:
    """Return vLLM's version as its own `_version.py` states it."""
    found = _find(source, "vllm._version", "__version__")
    if found is not None and isinstance(found.node, ast.Constant):
        return str(found.node.value)
    return "unknown version"


def missing_from(source: Source, internals: Iterable[Internal] | None = None) -> list[str]:
    """Return a message for each internal that a source lacks; all registered ones by default."""
    found = (_missing(source, i) for i in (INTERNALS if internals is None else internals))
    return list(dict.fromkeys(what for what in found if what is not None))


def _missing(source: Source, internal: Internal) -> str | None:
    """Return the message about what a source lacks of one internal, as `contract.missing` does."""
    package = internal.module.split(".")[0]
    if package != "vllm" and _module(source, package) is None:
        return None
    if _module(source, internal.module) is None:
        return f"{internal.module} does not exist"
    found = _find(source, internal.module, internal.name)
    if found is None:
        return contract.absent(internal)
    if internal.leading or internal.named:
        return contract.wrong_parameters(internal, _parameters(source, found))
    lacking = [f for f in contract.wanted(internal) if not _has(source, found, f)]
    return contract.lacking_fields(internal, lacking)


# --- finding definitions ------------------------------------------------------------------------


def _module(source: Source, name: str) -> ast.Module | None:
    """Return a parsed module, None if there is no such file."""
    if name not in source.parsed:
        path = name.replace(".", "/")
        package = source.text_of(f"{path}/__init__.py")
        text = source.text_of(f"{path}.py") if package is None else package
        source.parsed[name] = None if text is None else (ast.parse(text), package is not None)
    entry = source.parsed[name]
    return None if entry is None else entry[0]


def _find(source: Source, module: str, name: str, hops: int = FURTHEST) -> Definition | None:
    """Return the definition of a name; a dotted name is looked up part by part."""
    first, _, rest = name.partition(".")
    found = _top_level(source, module, first, hops)
    for part in rest.split(".") if rest else ():
        if found is None or not isinstance(found.node, ast.ClassDef):
            return None
        found = _member(source, found, part, hops)
    return found


def _top_level(source: Source, module: str, name: str, hops: int) -> Definition | None:
    """Return the last definition of a name in a module, re-exports and aliases followed."""
    tree = _module(source, module)
    if tree is None or not hops:
        return None
    found: Definition | None = None
    for statement in _statements(tree.body):
        if isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                if alias.name != "*" and name != (alias.asname or alias.name):
                    continue
                origin = _origin(source, module, statement)
                wanted = name if alias.name == "*" else alias.name
                found = _top_level(source, origin, wanted, hops - 1) or found
        else:
            value = _bound(statement, name)
            if isinstance(value, ast.Name) and value.id != name:
                value_definition = _top_level(source, module, value.id, hops - 1)
                found = value_definition or Definition(value, module)
            elif value is not None:
                found = Definition(value, module)
    return found


def _origin(source: Source, module: str, statement: ast.ImportFrom) -> str:
    """Return the module that an import takes its names from."""
    if not statement.level:
        return statement.module or ""
    entry = source.parsed[module]
    parts = module.split(".")
    up = statement.level - (1 if entry is not None and entry[1] else 0)
    base = parts[: len(parts) - up]
    return ".".join([*base, *([statement.module] if statement.module else [])])


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a module or class, those below `if`, `try` and `with` included."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try | ast.With):
            for _, value in ast.iter_fields(statement):
                for inner in value if isinstance(value, list) else ():
                    nested = inner.body if isinstance(inner, ast.ExceptHandler) else [inner]
                    yield from _statements(n for n in nested if isinstance(n, ast.stmt))


def _bound(statement: ast.stmt, name: str) -> ast.AST | None:
    """Return what a statement binds a name to: a definition, a value or an annotation."""
    if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return statement if statement.name == name else None
    if isinstance(statement, ast.AnnAssign):
        target = statement.target
        bound = isinstance(target, ast.Name) and target.id == name
        return (statement.value or statement.annotation) if bound else None
    if isinstance(statement, ast.Assign):
        names = {
            node.id
            for target in statement.targets
            for node in ast.walk(target)
            if isinstance(node, ast.Name)
        }
        return statement.value if name in names else None
    return None


# --- looking at classes and callables -----------------------------------------------------------


def _line(source: Source, found: Definition, hops: int = FURTHEST) -> Iterator[Definition]:
    """Yield a class and its bases, as far as the source holds them, nearest first."""
    yield found
    if not isinstance(found.node, ast.ClassDef) or not hops:
        return
    for base in found.node.bases:
        plain = base.value if isinstance(base, ast.Subscript) else base  # Generic[T]
        if isinstance(plain, ast.Name):
            definition = _find(source, found.module, plain.id, hops - 1)
            if definition is not None and isinstance(definition.node, ast.ClassDef):
                yield from _line(source, definition, hops - 1)


def _member(source: Source, cls: Definition, name: str, hops: int) -> Definition | None:
    """Return what a class or one of its bases binds a name to."""
    for level in _line(source, cls, hops):
        assert isinstance(level.node, ast.ClassDef)
        for statement in _statements(level.node.body):
            value = _bound(statement, name)
            if value is not None:
                return Definition(value, level.module)
    return None


def _has(source: Source, found: Definition, name: str) -> bool:
    """Return whether a class binds a name, or one of its methods assigns an attribute of it."""
    if not isinstance(found.node, ast.ClassDef):
        return False
    if _member(source, found, name, FURTHEST) is not None:
        return True
    return any(
        isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.attr == name
        for level in _line(source, found)
        for node in ast.walk(level.node)
    )


def _parameters(source: Source, found: Definition) -> list[str]:
    """Return the names of a callable's parameters; a class is called as its `__init__` is."""
    node = found.node
    if isinstance(node, ast.ClassDef):
        init = _member(source, found, "__init__", FURTHEST)
        if init is not None:
            return _parameters(source, init)
        fields = [
            statement.target.id
            for level in reversed(list(_line(source, found)))
            if isinstance(level.node, ast.ClassDef)
            for statement in level.node.body
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
        ]
        return list(dict.fromkeys(fields))
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return []
    given = node.args
    return [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
