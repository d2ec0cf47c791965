"""Check a document against a pydantic model, with messages for people."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import date
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from saeguard.yaml_files.codes import Code
from saeguard.yaml_files.findings import Finding, did_you_mean, show
from saeguard.yaml_files.reader import Document, Loc
from saeguard.yaml_files.scalars import AmbiguousError, describe, plain
from saeguard.yaml_files.section import FORMS

M = TypeVar("M", bound=BaseModel)

_TYPES = {
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "date_type": "a date such as 2027-02-01",
    "dict_type": "a mapping",
    "list_type": "a list",
    "model_type": "a mapping",
}
_SPELT = re.compile(r"(?P<number>\d{1,9}([.,]\d{1,9})?) ?(?P<percent>%)|(?P<comma>\d{1,9},\d{1,9})")
"""A percentage, or a number with a decimal comma."""
_BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}


def shape(model: type[M], document: Document) -> tuple[M | None, list[Finding]]:
    """Return the document as `model`, or every way in which it is not one."""
    try:
        return model.model_validate(document.data), []
    except ValidationError as invalid:
        errors = invalid.errors(include_url=False)
    return None, [_translated(model, document, error) for error in errors]


def merged(document: Document, found: Iterable[Finding]) -> list[Finding]:
    """Return the mistakes in the YAML and in its content, in the order of the file.

    A value that is wrong as YAML is reported once; its content is wrong as a consequence.
    """
    wrong_already = {(error.line, error.column) for error in document.errors}
    follow = [error for error in found if (error.line, error.column) not in wrong_already]
    return sorted([*document.errors, *follow], key=lambda error: (error.line, error.column))


def _translated(model: type[BaseModel], document: Document, error: Mapping[str, Any]) -> Finding:
    loc: Loc = error["loc"]
    at_key = error["type"] == "extra_forbidden"
    if loc and loc[-1] == "[key]" and loc not in document.values:  # pydantic's mark for a key
        loc, at_key = loc[:-1], True
    code, message = _message(model, loc, error)
    return document.error(code, message, loc, at_key=at_key)


def _message(model: type[BaseModel], loc: Loc, error: Mapping[str, Any]) -> tuple[Code, str]:
    mistake: str = error["type"]
    value = error["input"]
    found = describe(value) if isinstance(value, dict | list) else show(value)
    context: Mapping[str, Any] = error.get("ctx", {})
    code: Code
    if mistake == "extra_forbidden":
        keys = _keys(model, loc[:-1])
        hint = did_you_mean(str(loc[-1]), keys)
        code, what = "unknown-key", f"{show(str(loc[-1]))} is not a key here; {hint}"
        what += f"allowed: {', '.join(keys)}"
    elif mistake == "missing":
        code, what = "missing-key", f"the key {show(loc[-1])} is missing; add it"
    elif mistake in _TYPES:
        code, what = "wrong-type", f"found {describe(value)}, expected {_TYPES[mistake]}"
        what += _spelling(value, mistake)
    elif mistake == "literal_error":
        allowed = context["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        hint = did_you_mean(value, allowed) if isinstance(value, str) else ""
        if isinstance(value, bool):
            found, allowed = str(value).lower(), [word.lower() for word in allowed]
        code, what = "not-allowed", f"found {found}; {hint}allowed: {', '.join(allowed)}"
    elif mistake in _BOUNDS:
        bound, words = _BOUNDS[mistake]
        code, what = "out-of-range", f"found {found}; write a number {words} "
        what += f"{context[bound]:g}"
    elif mistake == "string_pattern_mismatch":
        code, what = "bad-name", f"found {found}; write {_form(context['pattern'])}"
    elif mistake.endswith("too_long"):
        unit = "characters" if isinstance(value, str) else "entries"
        code, what = "too-long", f"at most {context['max_length']} {unit} are allowed here"
    elif mistake.endswith("too_short"):
        least = context["min_length"]
        many = f"expected at least {least} entries; add some"
        code, what = "empty-value", many if least > 1 else "the value is empty; write one"
    else:
        code = "bad-phrase" if mistake == "bad-phrase" else "invalid-value"
        what = f"found {found}; {error['msg']}"
    return code, what


def _form(pattern: str) -> str:
    return FORMS.get(pattern, f"text that matches {pattern}")


def _spelling(value: object, mistake: str) -> str:
    """Return how to write what was meant, if that can be told: with or without quotes, or sign."""
    if mistake == "string_type" and isinstance(value, int | float | date):
        return "; put it in quotes"
    if not isinstance(value, str) or mistake not in {"int_type", "float_type", "date_type"}:
        return ""
    meant = _SPELT.fullmatch(value.strip())
    if meant and mistake == "float_type":
        spelt = (meant["number"] or meant["comma"]).replace(",", ".")
        number = float(spelt) / (100 if meant["percent"] else 1)
        return f'; for "{value.strip()}" write {number:g}'
    try:
        unquoted = plain(value)
    except AmbiguousError:
        return ""
    wanted = {"int_type": (int,), "float_type": (int, float), "date_type": (date,)}[mistake]
    return "; write it without quotes" if type(unquoted) in wanted else ""


def _keys(model: type[BaseModel], loc: Loc) -> list[str]:
    """Return the keys allowed in the mapping at `loc`."""
    annotation: Any = model
    for step in loc:
        fields = _fields(annotation)
        annotation = fields[str(step)] if fields else get_args(annotation)[-1]
        annotation = next(filter(_fields, _alternatives(annotation)), annotation)
    return list(_fields(annotation))


def _alternatives(annotation: Any) -> Iterator[Any]:
    yield annotation
    if type(None) in get_args(annotation):
        yield from get_args(annotation)


def _fields(annotation: Any) -> dict[str, Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        fields = annotation.model_fields
        return {field.alias or name: field.annotation for name, field in fields.items()}
    return {}
