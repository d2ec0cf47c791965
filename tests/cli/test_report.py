"""SARIF: what code scanning reads of `saeguard check`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.cli.project import lay_out, run
from tests.policy.example import changed

# The parts of OASIS' sarif-schema-2.1.0.json that these logs use, every key of theirs closed, so
# that a key which the standard has not would be refused. The sections are those of the standard.
TEXT = {
    "type": "object",
    "required": ["text"],
    "additionalProperties": False,
    "properties": {"text": {"type": "string", "minLength": 1}},
}  # 3.11
ARTIFACT = {
    "type": "object",
    "required": ["uri"],
    "additionalProperties": False,
    "properties": {
        "uri": {"type": "string", "format": "uri-reference"},
        "uriBaseId": {"type": "string"},
    },
}  # 3.4
REGION = {
    "type": "object",
    "required": ["startLine"],
    "additionalProperties": False,
    "properties": {
        "startLine": {"type": "integer", "minimum": 1},
        "startColumn": {"type": "integer", "minimum": 1},
        "snippet": TEXT,
    },
}  # 3.30
PLACE = {
    "type": "object",
    "required": ["artifactLocation"],
    "additionalProperties": False,
    "properties": {"artifactLocation": ARTIFACT, "region": REGION},
}  # 3.29
LOCATION = {
    "type": "object",
    "required": ["physicalLocation"],
    "additionalProperties": False,
    "properties": {"physicalLocation": PLACE},
}  # 3.28
RESULT = {
    "type": "object",
    "required": ["message"],
    "additionalProperties": False,
    "properties": {
        "ruleId": {"type": "string"},
        "ruleIndex": {"type": "integer", "minimum": -1},
        "level": {"enum": ["none", "note", "warning", "error"]},
        "message": TEXT,
        "locations": {"type": "array", "items": LOCATION},
    },
}  # 3.27
RULE = {
    "type": "object",
    "required": ["id"],
    "additionalProperties": False,
    "properties": {
        "id": {"type": "string"},
        "name": {"type": "string"},
        "helpUri": {"type": "string", "format": "uri"},
    },
}  # 3.49
DRIVER = {
    "type": "object",
    "required": ["name"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string"},
        "version": {"type": "string"},
        "rules": {"type": "array", "uniqueItems": True, "items": RULE},
    },
}  # 3.19
RUN = {
    "type": "object",
    "required": ["tool"],
    "additionalProperties": False,
    "properties": {
        "tool": {"type": "object", "required": ["driver"], "properties": {"driver": DRIVER}},
        "columnKind": {"enum": ["utf16CodeUnits", "unicodeCodePoints"]},
        "originalUriBaseIds": {"type": "object", "additionalProperties": ARTIFACT},
        "results": {"type": "array", "items": RESULT},
    },
}  # 3.14
SARIF = {"type": "object", "required": ["version", "runs"], "additionalProperties": False,
         "properties": {"$schema": {"type": "string", "format": "uri"},
                        "version": {"const": "2.1.0"},
                        "runs": {"type": "array", "items": RUN}}}  # 3.13  # fmt: skip


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start in a folder with one good policy and its feature set."""
    lay_out(tmp_path)
    monkeypatch.chdir(tmp_path)


def sarif(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    """Return the log, which has to be SARIF and to agree with itself."""
    run("check", "--format", "sarif", *options)
    log = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator(SARIF).validate(log)
    [only] = log["runs"]
    rules = [rule["id"] for rule in only["tool"]["driver"]["rules"]]
    assert all(rules[result["ruleIndex"]] == result["ruleId"] for result in only["results"])
    return dict(only)


def test_nothing_found(capsys: pytest.CaptureFixture[str]) -> None:
    """All well is an empty list of results, which closes what was open before."""
    assert sarif(capsys)["results"] == []


def test_results(capsys: pytest.CaptureFixture[str]) -> None:
    """A result has its rule, level, place and source line; the path is relative."""
    Path("policies/p.yaml").write_text(
        changed(("severity: high", "severity: hihg"), ("owner: s", 'owner: "\\u202e s'))
        .replace("@example.com", '@example.com"', 1)
    )  # fmt: skip
    only = sarif(capsys)

    places = [r["locations"][0]["physicalLocation"] for r in only["results"]]
    assert [(r["ruleId"], r["level"]) for r in only["results"]] == [
        ("control-character", "error"),
        ("not-allowed", "error"),
    ]
    assert places[1] == {
        "artifactLocation": {"uri": "policies/p.yaml", "uriBaseId": "%SRCROOT%"},
        "region": {
            "startLine": 5,
            "startColumn": 11,
            "snippet": {"text": "severity: hihg"},
        },
    }


def test_names_that_are_no_uris(capsys: pytest.CaptureFixture[str]) -> None:
    """Spaces and signs in a path are escaped, also where it is outside the working folder."""
    odd = Path("policies/a b#c%.yaml")
    odd.write_text("id: 12")
    outside = Path.cwd().parent / "out side.yaml"
    outside.write_text("id: 12")

    results = sarif(capsys, "policies", str(outside))["results"]

    uris = {r["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for r in results}
    assert uris == {"policies/a%20b%23c%25.yaml", outside.as_uri()}


def test_a_file_as_a_whole(capsys: pytest.CaptureFixture[str]) -> None:
    """What is wrong with a whole file has no region."""
    [result] = sarif(capsys, "gone")["results"]

    assert "region" not in result["locations"][0]["physicalLocation"]
