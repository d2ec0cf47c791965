"""`saeguard events`: ask the event log what fired, for whom, and what was not looked at."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from saeguard.cli.event_output import Form, shown, write
from saeguard.cli.report import count
from saeguard.errors import InputError
from saeguard.yaml_files.findings import did_you_mean, show

if TYPE_CHECKING:
    from saeguard.events.log_tables import LogTables
    from saeguard.events.questions import Answer

LOOK_S = 0.5
"""Seconds between two looks at a log that is followed."""
CLEAR = "\x1b[2J\x1b[H"
"""Empties a terminal."""
POLICIES = "SELECT DISTINCT policy FROM lines WHERE policy IS NOT NULL ORDER BY policy"


def verb(
    question: Annotated[
        Literal[
            "policies", "requests", "skipped", "unjudged", "features", "reloads", "refusals", "sql"
        ],
        typer.Argument(
            help="policies: how often each fired; requests: which matched; skipped: tokens not "
            "looked at; unjudged: errors and requests without a verdict; features: which fired "
            "most; reloads: what changed when; refusals; sql: a query of your own."
        ),
    ],
    logs: Annotated[
        list[Path], typer.Argument(help="Event logs: plain, .gz or .zst.", show_default=False)
    ],
    since: Annotated[
        str | None, typer.Option(help="From when: 90m, 24h, 7d ago, or 2026-11-29T08:00 (UTC).")
    ] = None,
    until: Annotated[str | None, typer.Option(help="Up to when, likewise.")] = None,
    policy: Annotated[
        list[str] | None, typer.Option(help="Id of a policy. Repeatable. Default: all.")
    ] = None,
    where: Annotated[
        str, typer.Option(help="Condition in SQL, such as \"tenant = 'bank' AND score > 2\".")
    ] = "",
    by: Annotated[
        str, typer.Option(help="Groups: hour, day, tenant, model, watchlist; joined by commas.")
    ] = "",
    limit: Annotated[int | None, typer.Option(help="Most rows.", min=1)] = None,
    query: Annotated[
        str,
        typer.Option(
            "--query",
            help="With sql: a query over verdicts, requests, fired, skipped, reloads, refusals.",
        ),
    ] = "",
    form: Annotated[
        Form, typer.Option("--format", help="table, json, csv; parquet needs --out.")
    ] = "table",
    out: Annotated[Path | None, typer.Option(help="File to write the answer to.")] = None,
    rotated: Annotated[
        bool, typer.Option(help="Read the files that log rotation made of the logs, too.")
    ] = True,
    follow: Annotated[
        bool, typer.Option("--follow", help="Answer again whenever the last log has grown.")
    ] = False,
) -> None:
    """Answer a question from one or many event logs.

    Logs hold no text. Needs the extra `tables` of saeguard. Exit codes: 0 whatever the answer, 2
    a log or the command is wrong, 3 a package is missing or the answer cannot be written.
    """
    from saeguard.events.log_tables import LogTables, log_files
    from saeguard.events.questions import GROUPS, Chosen, ask, moment, run

    if (question == "sql") != bool(query):
        raise InputError("--query: expected with the question sql, and only there")
    if form == "parquet" and out is None:
        raise InputError("--out: parquet needs a file to write; name one")
    if follow and out is not None:
        raise InputError("--follow: it prints and writes no file; leave --out out")
    groups = tuple(part.strip() for part in by.split(",") if part.strip())
    for group in groups:
        if group not in GROUPS:
            raise InputError(f"--by: found {group!r}; allowed: {', '.join(GROUPS)}")
    chosen = Chosen(
        since=None if since is None else moment(since),
        until=None if until is None else moment(until),
        policies=tuple(policy or ()),
        where=where,
        by=groups,
        limit=limit,
    )
    files = log_files(logs, rotated=rotated)
    tables = LogTables(files)

    def answer() -> Answer:
        return run(tables, query) if question == "sql" else ask(tables, question, chosen)

    _warn_of_unknown(tables, chosen.policies)
    if follow:
        _follow(tables, logs[-1], lambda: shown(answer(), form))
        return
    found = answer()
    if len(files) > len(logs):
        typer.echo(f"read {len(files)} files: {', '.join(file.name for file in files)}", err=True)
    if out is None:
        typer.echo(shown(found, form), nl=False)
    else:
        write(found, form, out)
        typer.echo(f"{count(len(found.rows), 'row')} written to {out}")
    _warn(tables)


def _warn_of_unknown(tables: LogTables, policies: Sequence[str]) -> None:
    """Name policies that no line is about: a misspelt one would look like one that never fires."""
    if not policies:
        return
    known = [str(row[0]) for row in tables.execute(POLICIES).fetchall()]
    for policy in policies:
        if policy not in known:
            typer.echo(
                f"no line is of the policy {show(policy)}: it has not fired, or the id is "
                f"misspelt; {did_you_mean(policy, known)}those with lines: "
                f"{', '.join(known) or 'none'}",
                err=True,
            )


def _warn(tables: LogTables) -> None:
    if tables.unread:
        lines = count(tables.unread, "line")
        typer.echo(f"not an event, and passed over: {lines}", err=True)
    mismatches = tables.count("SELECT count(*) FROM lines WHERE event = 'ledger_mismatch'")
    if mismatches:
        typer.echo(
            f"a fault of the guard (event ledger_mismatch): the tokens of "
            f"{count(mismatches, 'request')} do not add up",
            err=True,
        )


def _follow(tables: LogTables, path: Path, answer: Callable[[], str]) -> None:
    """Print an answer, and print it again whenever a log has grown; ends by Ctrl-C."""
    from saeguard.events.follow import Follower

    follower = Follower(path)
    last = ""
    try:
        while True:
            now = answer()
            if now != last:
                typer.echo(f"{CLEAR if sys.stdout.isatty() else ''}{now}", nl=False)
                last = now
            while not (lines := follower.read()):
                time.sleep(LOOK_S)
            tables.add_lines(lines)
    except KeyboardInterrupt:
        _warn(tables)
    finally:
        follower.close()
