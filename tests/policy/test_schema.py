"""The JSON Schema that ships, and the policies that ship."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from saeguard.policy.load import load_policies
from saeguard.policy.schema import json_schema
from saeguard.policy_tools import test_case_schema
from tests.policy.example import GOOD, changed

SCHEMA = Path("policies/saeguard.policy.v1.json")
POLICIES = [policy.path for policy in load_policies(Path("policies"))]


def errors(text: str) -> list[str]:
    """Return what the schema has against a policy, with dates as the text they are in JSON."""
    validator = jsonschema.Draft202012Validator(json_schema())
    data = json.loads(json.dumps(yaml.safe_load(text), default=str))
    return [error.message for error in validator.iter_errors(data)]


def test_is_current() -> None:
    """The file is what `saeguard policy schema` prints; run that to renew it."""
    assert json.loads(SCHEMA.read_text()) == json_schema()


def test_that_of_test_files() -> None:
    """It is current, valid in itself, and holds for every test file that ships."""
    schema = test_case_schema.json_schema()
    assert json.loads(Path("policies/saeguard.test.v1.json").read_text()) == schema
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for path in sorted(Path("policies").rglob("*.test.yaml")):
        text = path.read_text()
        assert [e.message for e in validator.iter_errors(yaml.safe_load(text))] == []
        assert text.startswith("# yaml-language-server: $schema=../saeguard.test.v1.json\n")


def test_is_a_schema() -> None:
    """It is a valid schema in itself."""
    jsonschema.Draft202012Validator.check_schema(json_schema())


@pytest.mark.parametrize("path", POLICIES, ids=[path.stem for path in POLICIES])
def test_shipped_policies(path: Path) -> None:
    """Each shipped policy satisfies it, refers to it, and has tests."""
    text = path.read_text()

    assert errors(text) == []
    assert text.startswith("# yaml-language-server: $schema=../saeguard.policy.v1.json\n")
    assert path.with_suffix(".test.yaml").exists()


def test_shipped_tests_pass() -> None:
    """The tests of the shipped policies pass."""
    command = [sys.executable, "-c", "from saeguard.cli import main; main()"]
    done = subprocess.run(
        [*command, "test", "--require-tests"], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("severity: high", "severity: hihg"),
        ("for: 3 of 8 tokens", "for: 3/8"),
        ("for: 3 of 8 tokens", "for: 3 tokens in request"),
        ("keep: 16 tokens", "keep: soon"),
        ("above: 0.6", "above: 0.6, over: median of 3 tokens"),
        ("scope: output", 'scope: output\nsample: "10"'),
        ("scope: output", "scope: output\nclamp: {features: [a], to: 0, when: later}"),
        ("above: 0.6", "above: 0"),
        ("owner: safety", "owners: safety"),
        ("title: Writes a shell command built from user text\n", ""),
    ],
)
def test_editors_see_mistakes(old: str, new: str) -> None:
    """What the schema can say, an editor underlines while it is typed."""
    assert errors(GOOD) == []
    assert errors(changed((old, new)))


def test_every_key_is_described() -> None:
    """Each key has a description, which editors show."""

    def described(schema: dict[str, Any]) -> Iterator[tuple[str, str]]:
        for part in (schema, *schema["$defs"].values()):
            for key, value in part["properties"].items():
                yield key, value.get("description", "")

    assert [key for key, description in described(json_schema()) if not description] == []
