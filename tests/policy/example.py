"""One good policy to start from, and what tests do with it."""

from __future__ import annotations

from pathlib import Path

from saeguard.policy.load import parse_policy
from saeguard.policy.types import Policy
from saeguard.yaml_files.findings import Finding
from saeguard.yaml_files.raw import read_bytes

GOOD = """\
schema: saeguard.policy/v1
id: unsafe-code.shell-injection
title: Writes a shell command built from user text
owner: safety-code@example.com
severity: high
mode: shadow
action: flag
on_error: allow
scope: output
feature_set: demo/unsafe-code
rationale: >-
  Fires on os.system and subprocess(shell=True)
  with untrusted input.
falsepositives: [Security tutorials]
review_by: 2027-02-01
detect:
  shell: {feature: shell_exec, above: 0.6}
  untrusted: {feature: string_built, above: 0.4}
condition: shell and untrusted
for: 3 of 8 tokens
keep: 16 tokens
exceptions:
  - {id: red-team, reason: red team, owner: rt@example.com, expires: 2027-03-31, tenant: red}
"""


def changed(*changes: tuple[str, str]) -> str:
    """Return the good policy with each text replaced by another; each has to occur."""
    text = GOOD
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new, 1)
    return text


def read_policy(path: Path) -> tuple[Policy | None, list[Finding]]:
    """Return one policy, or everything that is wrong with its file."""
    raw = read_bytes(path)
    return (None, [raw]) if isinstance(raw, Finding) else parse_policy(path, raw)


def read(folder: Path, text: str | bytes) -> tuple[Policy | None, list[Finding]]:
    """Read `text` as a policy file."""
    path = folder / "p.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_policy(path)


def policy(folder: Path, *changes: tuple[str, str]) -> Policy:
    """Return the good policy with changes, read from a file."""
    found, errors = read(folder, changed(*changes))
    assert found, "\n".join(error.render() for error in errors)
    return found
