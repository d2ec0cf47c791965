"""`saeguard doctor`: what is wrong with this environment, and what to do."""

from __future__ import annotations

import typer


def verb() -> None:
    """Look at Python, torch, vLLM and the plugin; exit 1 if anything is in the way."""
    from rich.console import Console

    from saeguard.vllm.doctor import CHECKS

    console = Console()
    bad = 0
    for check in CHECKS:
        with console.status(check.__doc__ or ""):
            finding = check()
        mark = "[green]ok  [/]" if finding.ok else "[red]bad [/]"
        console.print(f"{mark} {finding.what}: ", end="")
        console.print(finding.found, markup=False, highlight=False)
        if not finding.ok:
            bad += 1
            console.print(f"     [bold]do:[/] {finding.remedy}", highlight=False)
    if bad:
        console.print(f"[red]{bad} of {len(CHECKS)} checks failed[/]")
        raise typer.Exit(1)
    console.print("[green]everything the guard needs is there[/]")
