"""Print findings as text, JSON, SARIF for code scanning, or GitHub annotations."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias
from urllib.parse import quote

import typer

if TYPE_CHECKING:
    from saeguard.yaml_files.findings import Finding, Level

Format: TypeAlias = Literal["text", "json", "sarif", "github"]

SARIF_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
ANNOTATIONS: dict[Level, str] = {"error": "error", "warning": "warning", "note": "notice"}


def rendered(findings: Sequence[Finding], format_: Format) -> str:
    """Return the findings in one of the formats; empty if there is nothing to print."""
    from saeguard.yaml_files.codes import page
    from saeguard.yaml_files.findings import render_all

    match format_:
        case "json":
            records = [
                asdict(f) | {"path": os.fspath(f.path), "help": page(f.code)} for f in findings
            ]
            return json.dumps(records, indent=2)
        case "sarif":
            return json.dumps(sarif(findings), indent=2)
        case "github":
            return "\n".join(map(annotation, findings))
        case "text":
            return render_all(findings, style=partial(typer.style, dim=True))


def annotation(finding: Finding) -> str:
    """Return a GitHub workflow command, which annotates the line in a pull request."""
    place = {"file": finding.path, "line": finding.line, "col": finding.column}
    known = {key: value for key, value in place.items() if value} | {"title": finding.code}
    properties = ",".join(f"{key}={_escaped(str(value))}" for key, value in known.items())
    kind = ANNOTATIONS[finding.level]
    return f"::{kind} {properties}::{_escaped(finding.message, ends='')}"


def sarif(findings: Sequence[Finding]) -> dict[str, Any]:
    """Return the findings as a SARIF 2.1.0 log, with paths relative to the working folder.

    Source: OASIS, Static Analysis Results Interchange Format Version 2.1.0, sections 3.13 to 3.30.
    """
    from saeguard.yaml_files.codes import page

    codes = sorted({finding.code for finding in findings})
    driver = {
        "name": "saeguard",
        "version": metadata.version("saeguard"),
        "rules": [{"id": code, "name": _pascal(code), "helpUri": page(code)} for code in codes],
    }
    results = [
        {
            "ruleId": finding.code,
            "ruleIndex": codes.index(finding.code),
            "level": finding.level,
            "message": {"text": _clean(finding.message)},
            "locations": [{"physicalLocation": _location(finding)}],
        }
        for finding in findings
    ]
    return {
        "$schema": SARIF_SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {"driver": driver},
                # Columns count characters, as an editor's do, not UTF-16 units.
                "columnKind": "unicodeCodePoints",
                "originalUriBaseIds": {"%SRCROOT%": {"uri": f"{Path.cwd().as_uri()}/"}},
                "results": results,
            }
        ],
    }


def _location(finding: Finding) -> dict[str, Any]:
    path = Path(os.path.abspath(finding.path))  # noqa: PTH100 - links are kept as they are
    artifact: dict[str, str] = {"uri": path.as_uri()}
    if path.is_relative_to(Path.cwd()):
        relative = path.relative_to(Path.cwd()).as_posix()
        artifact = {"uri": quote(relative, errors="surrogateescape"), "uriBaseId": "%SRCROOT%"}
    if not finding.line:
        return {"artifactLocation": artifact}
    region: dict[str, Any] = {"startLine": finding.line, "startColumn": finding.column}
    if finding.source.strip():
        region["snippet"] = {"text": _clean(finding.source)}
    return {"artifactLocation": artifact, "region": region}


def _pascal(code: str) -> str:
    return "".join(word.capitalize() for word in code.split("-"))


def _clean(text: str) -> str:
    from saeguard.yaml_files.findings import printable

    return printable(text)


def _escaped(text: str, ends: str = ":,") -> str:
    text = _clean(text)
    for character in f"%{ends}":
        text = text.replace(character, f"%{ord(character):02X}")
    return text


def count(number: int, one: str, many: str = "") -> str:
    """Return `1 policy`, `2 policies`."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of text as aligned columns, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
