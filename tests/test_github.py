"""The files of `.github/` are what GitHub reads, by the schemas that check-jsonschema has."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.test_pages import ROOT

FILES = {
    "github-workflows": "workflows/*.yml",
    "github-issue-forms": "ISSUE_TEMPLATE/[!c]*.yml",
    "github-issue-config": "ISSUE_TEMPLATE/config.yml",
    "dependabot": "dependabot.yml",
}


@pytest.mark.parametrize("schema", FILES)
def test_github_can_read_it(schema: str) -> None:
    """Every file fits its schema, which the package brings along: no network."""
    files = sorted(map(str, (ROOT / ".github").glob(FILES[schema])))
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}"]

    done = subprocess.run([*command, *files], capture_output=True, text=True, check=False)

    assert files
    assert done.returncode == 0, done.stdout + done.stderr
