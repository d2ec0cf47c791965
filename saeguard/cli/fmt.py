"""`saeguard policy fmt`: bring policy and test files into the canonical layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from saeguard.cli.failures import FINDINGS, told
from saeguard.cli.report import count


def verb(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Files or folders. Default: policies.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; fail where something would be.")
    ] = False,
) -> None:
    """Lay out policy and test files: order of keys, blank lines, ends of lines.

    Comments stay with the key they stand above, and what a file says does not change. Exits with
    0, 1 where --check finds a file to be changed, 2 where a file cannot be read.
    """
    from saeguard.atomic_files import write_atomically
    from saeguard.policy.errors import PolicyError, PolicyErrors
    from saeguard.policy.files import find_files, read_bytes
    from saeguard.policy_tools.formatter import laid_out

    changed: list[Path] = []
    total = 0
    errors: list[PolicyError] = []
    with told():
        for place in paths or [Path("policies")]:
            files, found = find_files(place)
            errors += found
            for file in files:
                raw = read_bytes(file)
                if isinstance(raw, PolicyError):
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
                        write_atomically(file.resolve(), text)
        for file in changed:
            typer.echo(f"{'would change' if check else 'changed'} {file}")
        typer.echo(f"{count(total, 'file')}: {len(changed)} {'to change' if check else 'changed'}")
        if errors:
            raise PolicyErrors(errors)
    if check and changed:
        raise typer.Exit(FINDINGS)
