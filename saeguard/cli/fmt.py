"""`saeguard policy fmt`: the canonical layout of policy and test files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from saeguard.cli.report import count
from saeguard.errors import FINDINGS
from saeguard.real_path import real_path


def verb(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(help="Policy or test files, or folders. Default: policies."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit with 1 if a file would change.")
    ] = False,
) -> None:
    """Format policy and test files: order of keys, blank lines, line ends.

    Comments stay with the key below them, and the meaning of a file does not change. Exit codes:
    0, 1 --check found a file to change, 2 a file cannot be read.
    """
    from saeguard.atomic_files import write_atomically
    from saeguard.policy.errors import PolicyErrors
    from saeguard.policy.files import find_files
    from saeguard.policy_tools.formatter import laid_out
    from saeguard.yaml_files.findings import Finding
    from saeguard.yaml_files.raw import read_bytes

    changed: list[Path] = []
    total = 0
    errors: list[Finding] = []
    for place in paths or [Path("policies")]:
        files, found = find_files(place)
        errors += found
        for file in files:
            raw = read_bytes(file)
            if isinstance(raw, Finding):
                errors.append(raw)
                continue
            total += 1
            try:
                text = laid_out(file, raw)
            except PolicyErrors as wrong:
                errors += wrong.errors
                continue
            if text.encode() != raw:
                changed.append(file)
                if not check:
                    write_atomically(real_path(file), text)
    for file in changed:
        typer.echo(f"{'would change' if check else 'changed'} {file}")
    typer.echo(f"{count(total, 'file')}: {len(changed)} {'to change' if check else 'changed'}")
    if errors:
        raise PolicyErrors(errors)
    if check and changed:
        raise typer.Exit(FINDINGS)
