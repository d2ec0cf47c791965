"""The account as it is printed."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.style import Style
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from demo.account import OUTCOMES, Account, Clamped, Pair, RequestView, Token, Trace
from demo.judge import Judgement

SEVERITY_STYLE = {"critical": "bold red", "high": "red", "medium": "yellow", "low": "cyan"}
COLD, HOT = (58, 50, 24), (208, 52, 30)
"""RGB of the faintest and the strongest highlight; both carry white text."""
FAINT = 0.08
"""Shares below this are left uncoloured."""


def heat_style(token: Token, *, over: bool) -> Style:
    """Colour a token by its share; above the threshold it is bold as well, for any eye."""
    if token.skipped:
        return Style(dim=True)
    if token.heat < FAINT:
        return Style(dim=token.role != "output")
    red, green, blue = (
        round(cold + (hot - cold) * token.heat) for cold, hot in zip(COLD, HOT, strict=True)
    )
    return Style(color="white", bgcolor=f"rgb({red},{green},{blue})", bold=over)


def heat_text(trace: Trace, *, output: bool) -> Text:
    """Return the tokens of the output or of the prompt's messages, highlighted."""
    text = Text()
    role = ""
    for token in trace.tokens:
        if (token.role == "output") is not output or token.role == "template":
            continue
        if token.skipped == "special_token":
            continue
        if role not in ("", token.role):
            text.append("\n")
        role = token.role
        text.append(token.text, heat_style(token, over=trace.over(token)))
    text.rstrip()
    return text


def request_panel(view: RequestView) -> Panel:
    """Return a request: what was asked, what came back, what fired and where."""
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="bold", no_wrap=True)
    rows.add_column(overflow="fold")
    if view.trace is not None:
        rows.add_row("asked", heat_text(view.trace, output=False))
        rows.add_row("answered", heat_text(view.trace, output=True))
    else:
        rows.add_row("asked", Text(view.answer.messages[-1]["content"]))
        rows.add_row("answered", Text(view.answer.text))
    for hit in view.seen:
        line = Text()
        line.append(hit.policy.id, SEVERITY_STYLE[hit.policy.severity])
        line.append(f"  {hit.policy.severity}, score {hit.score:.2f}, from token {hit.first_token}")
        names = ", ".join(t.feature for t in hit.traces)
        line.append(f", by {names}" if names else "")
        rows.add_row(hit.action or "(shadow)", line)
    title = Text(f" {view.answer.id} ", "bold")
    if view.trace is not None:
        title.append(f"coloured by {view.trace.feature} ", "dim")
    return Panel(rows, title=title, title_align="left", border_style="grey50")


def policy_table(account: Account) -> Table:
    """Return the verdicts by policy."""
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
    """Return the matches by what the prompts invite."""
    title = "Requests by kind of prompt; matched counts policies in shadow, too"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2))
    table.add_column("prompts that invite")
    for name in ("requests", "matched for it", "matched at all", "flagged"):
        table.add_column(name, justify="right")
    for group in account.groups:
        false = "red" if group.ordinary else ""
        table.add_row(
            "nothing (ordinary)" if group.ordinary else group.name.replace("_", " "),
            str(group.requests),
            "" if group.ordinary else str(group.own),
            Text(str(group.matched), false if group.matched else ""),
            Text(str(group.flagged), false if group.flagged else ""),
        )
    return table


def findings_text(judgement: Judgement) -> Text:
    """Return what Bandit finds in an answer's code."""
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
    """Return one prompt's answers without and with the clamp, side by side."""
    grid = Table.grid(expand=True, padding=(0, 2))
    grid.add_column(ratio=1)
    grid.add_column(ratio=1)
    grid.add_row(Text("as it is", "bold"), Text("with the clamp", "bold"))
    grid.add_row(*(_code(side) for side in (pair.off, pair.on)))
    if pair.off.judgement.code or pair.on.judgement.code:
        grid.add_row(*(findings_text(side.judgement) for side in (pair.off, pair.on)))
    asked = Text(" / ".join(m["content"] for m in pair.off.answer.messages))
    return Panel(
        Group(asked, Text(), grid),
        title=Text(f" {pair.off.answer.id} ", "bold"),
        title_align="left",
        border_style="grey50",
    )


def clamp_line(clamped: Clamped) -> str:
    """Count what changed over all pairs, and what was lost."""
    pairs = clamped.pairs
    changed = sum(p.changed for p in pairs)
    said = f"{len(pairs)} prompts, of whose answers {changed} change"
    if clamped.objected is None:
        return said
    off, on = clamped.objected
    valid = sum(p.off.judgement.parses for p in pairs), sum(p.on.judgement.parses for p in pairs)
    return (
        f"{said}; Bandit objects to {off} answers as they are and to {on} with the clamp, and "
        f"{valid[0]} and {valid[1]} hold valid Python"
    )


def print_account(console: Console, account: Account) -> None:
    """Print everything, flagged requests first."""
    console.print()
    for view in (*account.flagged, *account.noticed):
        console.print(request_panel(view))
    quiet = account.quiet
    console.print(Text(f"Nothing matched {len(quiet)} requests:", "bold"))
    for view in quiet:
        console.print(_line(view))
    for clamped in account.clamped:
        console.print()
        console.print(Text(f"The clamp {clamped.policy.id}, asked for by the request", "bold"))
        console.print(pair_panel(clamped.shown))
        console.print(Text(clamp_line(clamped)))
    console.print()
    console.print(policy_table(account))
    console.print()
    console.print(group_table(account))
    console.print()
    console.print(Text(coverage_line(account)))


def coverage_line(account: Account) -> str:
    """Return how many tokens were evaluated and why the others were not."""
    said = account.coverage
    why = ", ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in said["skipped"].items())
    return (
        f"{said['evaluated']:,} of {said['tokens']:,} tokens were evaluated; not: {why or 'none'}"
    )


def _line(view: RequestView) -> Text:
    line = Text(f"  {view.answer.id:16}", "dim", no_wrap=True, overflow="ellipsis")
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
