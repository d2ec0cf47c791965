"""`saeguard doctor`: what is wrong with this environment or another vLLM, and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from saeguard.vllm.doctor import Finding


def verb(
    more: Annotated[
        list[Path] | None,
        typer.Argument(help="Further wheels or folders, after --vllm-source."),
    ] = None,
    *,
    vllm_source: Annotated[
        Path | None,
        typer.Option(
            help="Check a vLLM that is not installed: a wheel, or a folder that holds the package. "
            "Its files are read as text, never imported.",
        ),
    ] = None,
) -> None:
    """Check Python, torch, vLLM and the plugin, or a vLLM's source; exit with 1 on a problem."""
    from rich.console import Console

    from saeguard.vllm.doctor import CHECKS, check_source

    console = Console()
    bad = 0
    if vllm_source is None:
        if more:
            raise typer.BadParameter("wheels and folders go with --vllm-source")
        for check in CHECKS:
            with console.status(check.__doc__ or ""):
                finding = check()
            bad += _show(console, finding)
        count, sound = len(CHECKS), "everything the guard needs is there"
    else:
        paths = [vllm_source, *(more or [])]
        for path in paths:
            bad += _show(console, check_source(path))
        count, sound = len(paths), "every version has what the guard relies on"
    if bad:
        console.print(f"[red]{bad} of {count} checks failed[/]")
        raise typer.Exit(1)
    console.print(f"[green]{sound}[/]")


def _show(console: Any, finding: Finding) -> bool:
    """Print a finding; return whether it is a problem."""
    mark = "[green]ok  [/]" if finding.ok else "[red]bad [/]"
    console.print(f"{mark} ", end="")
    console.print(f"{finding.what}: {finding.found}", markup=False, highlight=False, soft_wrap=True)
    if not finding.ok:
        console.print(f"     [bold]do:[/] {finding.remedy}", highlight=False)
    return not finding.ok
