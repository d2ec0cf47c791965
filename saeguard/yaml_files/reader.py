"""Read YAML into plain data, and record the position of every key and value.

The reader works on PyYAML's events rather than on its nodes: it sees anchors, aliases and tags
before anything is built, never expands anything, and applies the caps on depth and count while
reading. Mistakes that leave the rest readable are collected; the others end the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import yaml

from saeguard.errors import SaeguardError
from saeguard.yaml_files.codes import Code
from saeguard.yaml_files.findings import Finding, show
from saeguard.yaml_files.scalars import CONTROL, AmbiguousError, Scalar, describe, plain

Loc: TypeAlias = tuple[str | int, ...]
"""A path in the data: keys and list indices from the root, as pydantic writes them."""

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, slots=True)
class FileKind:
    """What a kind of file may hold."""

    name: str
    """For messages: `policy`."""
    max_bytes: int = 64 * 1024
    max_depth: int = 8
    max_values: int = 4_000
    numbers: bool = False
    """Whether keys may be whole numbers, and values may have an exponent as in 1.5e-05."""


POLICY = FileKind("policy")


@dataclass(frozen=True, slots=True)
class Mark:
    """The position at which a key or value starts, and its extent."""

    line: int
    column: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Document:
    """The content of one file with positions, and what is wrong with it as YAML."""

    path: Path
    text: str
    data: Any
    keys: dict[Loc, Mark]
    values: dict[Loc, Mark]
    errors: tuple[Finding, ...] = ()

    def error(
        self, code: Code, message: str, loc: Loc, *, at_key: bool = False, offset: int = 0
    ) -> Finding:
        """Return an error that points at `loc`, or at the nearest thing around it.

        Args:
            code: the kind of mistake.
            message: what was found, what is allowed, what to do.
            loc: the value meant.
            at_key: point at the key rather than at its value.
            offset: characters into the text of the value.
        """
        while loc and loc not in self.values:
            loc, at_key = loc[:-1], True
        marks = self.keys if at_key and loc in self.keys else self.values
        mark = marks.get(loc, Mark(1, 1, 0, 0))
        start = self._inside(mark, self.at(loc), offset) if offset else mark.start
        return _error_at(self.path, self.text, start, code, message)

    def at(self, loc: Loc) -> Any:
        """Return the value at `loc`."""
        value = self.data
        for step in loc:
            value = value[step]
        return value

    def _inside(self, mark: Mark, value: Any, offset: int) -> int:
        """Return the position in the file of character `offset` of a text value.

        Folding and quoting change only white space unless there are escapes, so counting the
        other characters finds it. With escapes the start of the value is returned.
        """
        start = mark.start
        if self.text[start] in "\"'":
            start += 1
        elif self.text[start] in "|>":
            start = self.text.find("\n", start)
        wanted = value[:offset].split()
        ahead = sum(map(len, wanted)) if isinstance(value, str) else 0
        body = [i for i in range(start, mark.end) if not self.text[i].isspace()]
        if [self.text[i] for i in body[:ahead]] != list("".join(wanted)):
            return mark.start
        return body[ahead] if ahead < len(body) else body[-1] + 1


def read_document(path: Path, raw: bytes, kind: FileKind = POLICY) -> Document:
    """Read one YAML document. Never raises: see `Document.errors`."""
    if len(raw) > kind.max_bytes:
        message = f"the file is larger than {kind.max_bytes >> 10:,} KiB; split it into several"
        return _unreadable(path, "", 0, "too-large", message)
    try:
        text = raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        # UTF-8 up to here, so the position in characters is that in what decodes.
        text = error.object.decode("utf-8", "replace")
        message = f"byte 0x{error.object[error.start]:02x} is not UTF-8; save the file as UTF-8"
        start = len(error.object[: error.start].decode())
        return _unreadable(path, text, start, "not-utf8", message)
    control = CONTROL.search(text)
    if control:
        message = (
            f"the invisible character U+{ord(control.group()):04X} is not allowed in a "
            f"{kind.name} file; remove it"
        )
        return _unreadable(path, text, control.start(), "control-character", message)
    return _Reader(path, text, kind).document()


def _unreadable(path: Path, text: str, start: int, code: Code, message: str) -> Document:
    return Document(path, text, None, {}, {}, (_error_at(path, text, start, code, message),))


def _error_at(path: Path, text: str, start: int, code: Code, message: str) -> Finding:
    line_start = text.rfind("\n", 0, start) + 1
    source = text[line_start:].split("\n", 1)[0]
    line = text.count("\n", 0, start) + 1
    return Finding(path, line, start - line_start + 1, code, message, source)


class _StopError(SaeguardError):
    """The rest of the file cannot be read."""


@dataclass(slots=True)
class _Reader:
    path: Path
    text: str
    kind: FileKind
    keys: dict[Loc, Mark] = field(default_factory=dict)
    values: dict[Loc, Mark] = field(default_factory=dict)
    errors: list[Finding] = field(default_factory=list)

    def document(self) -> Document:
        data = None
        try:
            data = self._root(yaml.parse(self.text, Loader=_LOADER))
        except _StopError:
            pass
        except yaml.YAMLError as error:
            self._syntax(error)
        except (ValueError, OverflowError):  # PyYAML without libyaml, on escapes such as \U99999999
            self._report("yaml-syntax", "the file has an escape that is no character", 0)
        return Document(self.path, self.text, data, self.keys, self.values, tuple(self.errors))

    def _report(self, code: Code, message: str, start: int) -> None:
        self.errors.append(_error_at(self.path, self.text, start, code, message))

    def _stop(self, code: Code, message: str, start: int) -> NoReturn:
        self._report(code, message, start)
        raise _StopError

    def _syntax(self, error: yaml.YAMLError) -> None:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        start = min(mark.index, len(self.text)) if mark else 0
        problem = getattr(error, "problem", None) or "it cannot be read"
        context = getattr(error, "context", None)
        hint = "check the indentation, colons and quotes on this line and the one above"
        if self.text[start : start + 1] == "\t":
            hint = "indent with spaces, not with tabs"
        elif self.text[start : start + 1] in {"@", "`", "%"}:
            hint = "put text that starts with this character in quotes"
        found = f"{context}, {problem}" if context else problem
        self._report("yaml-syntax", f"this is not YAML: {found}; {hint}", start)

    def _root(self, events: Iterator[Any]) -> Any:
        data: Any = None
        documents = 0
        for event in events:
            start = event.start_mark.index
            match event:
                case yaml.DocumentStartEvent():
                    documents += 1
                    if documents > 1:
                        message = (
                            f"a second document starts here; write one {self.kind.name} per file"
                        )
                        self._stop("several-documents", message, start)
                    if event.version or event.tags:
                        self._stop("directive", "% directives are not allowed; remove it", start)
                case yaml.NodeEvent():
                    data = self._node(event, events, ())
                case _:
                    pass
        if documents == 0:
            self._stop("empty-file", f"the file is empty; write a {self.kind.name} or remove it", 0)
        return data

    def _node(self, event: Any, events: Iterator[Any], loc: Loc) -> Any:
        start = event.start_mark.index
        if len(loc) > self.kind.max_depth:
            message = f"nested more than {self.kind.max_depth} levels deep; flatten this part"
            self._stop("too-deep", message, start)
        if len(self.values) >= self.kind.max_values:
            message = f"more than {self.kind.max_values:,} values in one file; split the file"
            self._stop("too-many-values", message, start)
        self.values[loc] = self._mark(event)
        if isinstance(event, yaml.AliasEvent):
            message = f"the alias {show(f'*{event.anchor}')} is not allowed; write the value out"
            return self._report("alias", message, start)
        if event.anchor is not None:
            message = f"the anchor {show(f'&{event.anchor}')} is not allowed; remove it"
            self._report("anchor", message, start)
        if event.tag is not None:
            self._report("tag", f"the tag {show(event.tag)} is not allowed; remove it", start)
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._sequence(events, loc)
        return self._mapping(events, loc)

    def _mark(self, event: Any) -> Mark:
        at, end = event.start_mark, event.end_mark
        return Mark(at.line + 1, at.column + 1, at.index, end.index)

    def _scalar(self, event: Any) -> Scalar:
        text: str = event.value
        start = event.start_mark.index
        control = CONTROL.search(text)  # an escape such as "\u202e" brings them back
        if control:
            message = f"the text holds the invisible character U+{ord(control.group()):04X}"
            self._report("control-character", f"{message}; remove the escape", start)
            return ""
        if event.style or event.tag is not None:
            return text
        try:
            value = plain(text, exponents=self.kind.numbers)
        except AmbiguousError as error:
            self._report("ambiguous-value", f"found {text[:60]} without quotes: {error}", start)
            return text
        if value is None:
            message = "the key has no value; write one, or remove the key"
            self._report("no-value", message, start)
        return value

    def _sequence(self, events: Iterator[Any], loc: Loc) -> list[Any]:
        items: list[Any] = []
        for event in events:
            if isinstance(event, yaml.SequenceEndEvent):
                break
            items.append(self._node(event, events, (*loc, len(items))))
        return items

    def _mapping(self, events: Iterator[Any], loc: Loc) -> dict[str | int, Any]:
        mapping: dict[str | int, Any] = {}
        for event in events:
            if isinstance(event, yaml.MappingEndEvent):
                break
            key = self._key(event)
            if key in mapping:
                first = self.keys[*loc, key].line
                message = f"found the key {show(key)} on line {first} already; keep one of them"
                self._report("duplicate-key", message, event.start_mark.index)
                self._node(next(events), events, (*loc, f"{key} (again)"))
            else:
                self.keys[*loc, key] = self._mark(event)
                mapping[key] = self._node(next(events), events, (*loc, key))
        return mapping

    def _key(self, event: Any) -> str | int:
        start = event.start_mark.index
        if not isinstance(event, yaml.ScalarEvent):
            self._stop("key-type", "found a list or a mapping, expected a word as the key", start)
        if event.value == "<<" and not event.style:
            self._stop("merge-key", 'the merge key "<<" is not allowed; write the keys out', start)
        if event.anchor is not None or event.tag is not None:
            self._stop("key-type", "found a key with an anchor or a tag, expected a word", start)
        key = self._scalar(event)
        if self.kind.numbers and type(key) is int:
            return key
        if not isinstance(key, str):
            if key is not None:
                message = f"found {describe(key)}, expected a word as the key; put it in quotes"
                self._report("key-type", message, start)
            return event.value or "?"
        return key
