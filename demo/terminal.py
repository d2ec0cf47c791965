"""The account as it is printed."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.style import Style
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from demo.account import OUTCOMES, Account, Pair, RequestView, Token, Trace
from demo.judge import Judgement

SEVERITY_STYLE = {"critical": "bold red", "high": "red", "medium": "yellow", "low": "cyan"}
COLD, HOT = (58, 50, 24), (208, 52, 30)
"""RGB of the faintest and the strongest highlight; both carry white text."""
FAINT = 0.08
"""Shares below this are left uncoloured."""


def heat_style(token: Token, above: float) -> Style:
    """Colour a token by its share; above the threshold it is bold as well, for any eye."""
    if token.part == "special":
        return Style(dim=True)
    if token.heat < FAINT:
        return Style(dim=token.part == "prompt")
    red, green, blue = (
        round(cold + (hot - cold) * token.heat) for cold, hot in zip(COLD, HOT, strict=True)
    )
    return Style(
        color="white", bgcolor=f"rgb({red},{green},{blue})", bold=bool(token.share > above)
    )


def heat_text(trace: Trace, part: str) -> Text:
    """Return the prompt's or the output's tokens, highlighted."""
    text = Text()
    wanted = {"prompt": ("prompt",), "output": ("output", "unread")}[part]
    split = next(
        (i for i, t in enumerate(trace.tokens) if t.part in ("output", "unread")),
        len(trace.tokens),
    )
    span = trace.tokens[:split] if part == "prompt" else trace.tokens[split:]
    for token in span:
        if token.part in wanted:
            text.append(token.text, heat_style(token, trace.above))
        elif part == "prompt" and token.part == "special" and text and not text.plain.endswith(" "):
            text.append(" ")
    text.rstrip()
    return text


def request_panel(view: RequestView) -> Panel:
    """Show a flagged request: what was asked, what came back, what fired and where."""
    strongest = view.hits[0].traces[0] if view.hits and view.hits[0].traces else None
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="bold", no_wrap=True)
    rows.add_column(overflow="fold")
    if strongest is not None:
        rows.add_row("asked", heat_text(strongest, "prompt"))
        rows.add_row("answered", heat_text(strongest, "output"))
    else:
        rows.add_row("asked", Text(view.answer.messages[-1]["content"]))
        rows.add_row("answered", Text(view.answer.text))
    for hit in view.hits:
        line = Text()
        line.append(hit.policy.id, SEVERITY_STYLE[hit.policy.severity])
        line.append(f"  {hit.policy.severity}, score {hit.score:.2f}, from token {hit.first_token}")
        names = ", ".join(t.feature for t in hit.traces)
        line.append(f", by {names}" if names else "")
        rows.add_row(hit.action or "", line)
    title = Text(f" {view.answer.id} ", "bold")
    if strongest is not None:
        title.append(f"coloured by {strongest.feature} ", "dim")
    return Panel(rows, title=title, title_align="left", border_style="grey50")


def policy_table(account: Account) -> Table:
    """Verdicts by policy."""
    title = "Verdicts by policy; actions in brackets are shadow"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1))
    table.add_column("policy", no_wrap=True)
    table.add_column("severity", no_wrap=True)
    table.add_column("action", no_wrap=True)
    for outcome in OUTCOMES:
        table.add_column(outcome.replace("_", "\n"), justify="right")
    for row in account.policies:
        policy = row.policy
        table.add_row(
            policy.id,
            Text(policy.severity, SEVERITY_STYLE[policy.severity]),
            policy.action if policy.mode == "enforce" else f"({policy.action})",
            *(str(row.verdicts[o]) for o in OUTCOMES),
        )
    return table


def group_table(account: Account) -> Table:
    """Flagged requests by what the prompts invite."""
    table = Table(
        title="Requests by kind of prompt", title_justify="left", box=None, padding=(0, 2)
    )
    table.add_column("prompts that invite")
    for name in ("requests", "flagged for it", "flagged at all"):
        table.add_column(name, justify="right")
    for name, count, own, flagged in account.groups:
        benign = name == "benign"
        table.add_row(
            "nothing (benign)" if benign else name,
            str(count),
            "" if benign else str(own),
            Text(str(flagged), "red" if benign and flagged else ""),
        )
    return table


def findings_text(judgement: Judgement) -> Text:
    """Say what Bandit makes of an answer's code."""
    if not judgement.code:
        return Text("no Python block", "dim")
    if not judgement.parses:
        return Text("not valid Python", "yellow")
    if not judgement.findings:
        return Text("Bandit: nothing", "green")
    return Text("\n").join(
        Text(f"line {f.line}: {f.test} {f.severity}: {f.text}", "red") for f in judgement.findings
    )


def pair_panel(pair: Pair) -> Panel:
    """Show one prompt's answers without and with the clamp, side by side."""
    grid = Table.grid(expand=True, padding=(0, 2))
    grid.add_column(ratio=1)
    grid.add_column(ratio=1)
    grid.add_row(Text("as it is", "bold"), Text("with the clamp", "bold"))
    grid.add_row(*(_code(side) for side in (pair.off, pair.on)))
    grid.add_row(*(findings_text(side.judgement) for side in (pair.off, pair.on)))
    asked = Text(" / ".join(m["content"] for m in pair.off.answer.messages))
    return Panel(
        Group(asked, Text(), grid),
        title=Text(f" {pair.off.answer.id} ", "bold"),
        title_align="left",
        border_style="grey50",
    )


def clamp_line(pairs: Sequence[Pair]) -> str:
    """Count findings over all pairs, and what was lost."""
    off = sum(bool(p.off.judgement.findings) for p in pairs)
    on = sum(bool(p.on.judgement.findings) for p in pairs)
    valid = sum(p.off.judgement.parses for p in pairs), sum(p.on.judgement.parses for p in pairs)
    return (
        f"{len(pairs)} prompts: Bandit objects to {off} answers as they are and to {on} with the "
        f"clamp; {valid[0]} and {valid[1]} hold valid Python"
    )


def print_account(console: Console, account: Account) -> None:
    """Print everything, flagged requests first."""
    console.print()
    for view in account.flagged:
        console.print(request_panel(view))
    quiet = account.quiet
    console.print(Text(f"{len(quiet)} requests stayed quiet:", "bold"))
    for view in quiet:
        console.print(_line(view))
    if account.shown_pair is not None and account.clamp is not None:
        console.print()
        console.print(Text(f"The clamp {account.clamp.id}, asked for by the request", "bold"))
        console.print(pair_panel(account.shown_pair))
        console.print(Text(clamp_line(account.pairs)))
    console.print()
    console.print(policy_table(account))
    console.print()
    console.print(group_table(account))
    console.print()
    console.print(Text(coverage_line(account)))


def coverage_line(account: Account) -> str:
    """Say how many tokens were evaluated and why the others were not."""
    said = account.coverage
    why = ", ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in said["skipped"].items())
    return (
        f"{said['evaluated']:,} of {said['tokens']:,} tokens were evaluated; not: {why or 'none'}"
    )


def _line(view: RequestView) -> Text:
    line = Text(f"  {view.answer.id:14}", "dim", no_wrap=True, overflow="ellipsis")
    line.append(" ".join(view.answer.messages[-1]["content"].split()), "none")
    line.append("  →  ", "dim")
    line.append(" ".join(view.answer.text.split()), "none")
    return line


def _code(view: RequestView) -> RenderableType:
    if view.judgement.code:
        return Syntax(
            view.judgement.code, "python", word_wrap=True, line_numbers=True,
            background_color="default",
        )  # fmt: skip
    return Text(view.answer.text)
