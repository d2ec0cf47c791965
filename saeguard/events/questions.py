"""The questions that `saeguard events` answers, as SQL over the views of `log_tables`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from saeguard.errors import InputError

if TYPE_CHECKING:
    from saeguard.events.log_tables import LogTables

GROUPS = {
    "hour": "date_trunc('hour', time)",
    "day": "date_trunc('day', time)",
    "tenant": "tenant",
    "model": "model",
    "watchlist": "watchlist",
}
"""What --by takes, and the expression that it stands for."""
UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


@dataclass(frozen=True, slots=True)
class Question:
    """A question, and how it is answered."""

    help: str
    view: str
    """The view whose rows are chosen by time, policy and --where."""
    select: str
    """What is selected of the chosen rows. `{by}` stands for the groups and a comma."""
    order: str
    grouped: bool = True
    """Whether --by may split the answer."""
    of_requests: bool = False
    """Whether a column gives the share of all requests, of the same group."""


QUESTIONS: dict[str, Question] = {
    "policies": Question(
        "How often did each policy fire?",
        "verdicts",
        "{by} policy, mode, count(*) FILTER (verdict = 'match') AS matches, "
        "count(acted) AS acted, count(*) FILTER (verdict = 'error') AS errors, "
        "round(max(score), 3) AS highest",
        "matches DESC, policy, mode",
        of_requests=True,
    ),
    "requests": Question(
        "Which requests matched?",
        "verdicts",
        "time, request_id, tenant, policy, mode, acted, round(score, 3) AS score, first_token, "
        "matched_tokens, finished",
        "time DESC, request_id, policy",
        grouped=False,
    ),
    "skipped": Question(
        "Which tokens were not looked at, and why?",
        "skipped",
        "{by} reason, sum(skipped_tokens)::BIGINT AS skipped_tokens, count(*) AS requests",
        "skipped_tokens DESC, reason",
    ),
    "unjudged": Question(
        "What could not be judged?",
        "requests",
        "{by} count(*) AS requests, sum(policies)::BIGINT AS verdicts, "
        "sum(error)::BIGINT AS errors, sum(not_evaluated)::BIGINT AS not_evaluated, "
        "count(*) FILTER (error > 0) AS requests_with_errors, "
        "count(*) FILTER (error + not_evaluated >= policies) AS requests_without_verdict",
        "requests DESC",
    ),
    "features": Question(
        "Which features fired most?",
        "fired",
        "{by} feature, count(DISTINCT request_id) FILTER (tokens_above > 0) AS requests, "
        "sum(tokens_above)::BIGINT AS tokens_above, "
        "round(max(share), 3) AS highest_share, list_sort(list(DISTINCT policy)) AS policies",
        "tokens_above DESC, feature",
    ),
    "reloads": Question(
        "What changed when?",
        "reloads",
        "time, outcome, policies, came, vanished, changed, no_longer_enforced, old, new, error",
        "time",
        grouped=False,
    ),
    "refusals": Question(
        "Who asked for what may not be had?",
        "refusals",
        "{by} tenant, reason, count(*) AS refusals, max(time) AS last",
        "refusals DESC, reason",
    ),
}


@dataclass(frozen=True, slots=True)
class Chosen:
    """Which lines a question is about."""

    since: datetime | None = None
    until: datetime | None = None
    policies: tuple[str, ...] = ()
    where: str = ""
    """A condition in SQL, over the columns of the question's view."""
    by: tuple[str, ...] = ()
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """A table."""

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]


def moment(text: str, now: datetime | None = None) -> datetime:
    """Return a moment: `24h`, `7d` or `90m` ago, or a date with or without time, in UTC.

    Raises:
        InputError: it is neither.
    """
    ago = re.fullmatch(r"([0-9]{1,6})([mhdw])", text)
    if ago:
        return (now or datetime.now(UTC)) - timedelta(**{UNITS[ago[2]]: int(ago[1])})
    try:
        found = datetime.fromisoformat(text)
    except ValueError as error:
        raise InputError(
            f"found {text!r}; expected a time such as 90m, 24h, 7d, 2026-11-29 or 2026-11-29T08:00"
        ) from error
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def ask(tables: LogTables, name: str, chosen: Chosen) -> Answer:
    """Return the answer to a question.

    Args:
        tables: the logs.
        name: of the question.
        chosen: the lines that it is about.

    Raises:
        InputError: the condition is wrong, or the question has no groups.
    """
    question = QUESTIONS[name]
    if chosen.by and not question.grouped:
        raise InputError(
            f"--by: {name} lists single lines; leave --by out, or ask another question"
        )
    condition, values = _condition(question.view, chosen)
    if name == "requests" and "verdict" not in chosen.where:
        condition += " AND verdict = 'match'"
    groups = [f'{GROUPS[by]} AS "{by}"' for by in chosen.by]
    by = f"{', '.join(groups)}, " if groups else ""
    counted = f"SELECT {question.select.format(by=by)} FROM {question.view} WHERE {condition}"
    order = ", ".join([*(f'"{by}"' for by in chosen.by), question.order])
    if question.grouped:
        counted += " GROUP BY ALL"
    query = f"SELECT * FROM ({counted}) ORDER BY {order}"
    if question.of_requests:
        query = _with_share(tables, counted, chosen, order) or query
    if chosen.limit is not None:
        query += f" LIMIT {chosen.limit}"
    return run(tables, query, values)


def run(tables: LogTables, query: str, values: Sequence[Any] = ()) -> Answer:
    """Return the result of a query over the views.

    Raises:
        InputError: DuckDB refuses it; the message names the columns that there are.
    """
    import duckdb  # noqa: PLC0415 - of the extra `tables`

    try:
        found = tables.execute(query, values)
        names = tuple(str(column[0]) for column in found.description or ())
        return Answer(names, found.fetchall())
    except duckdb.Error as error:
        raise InputError(f"the query is refused: {str(error).splitlines()[0]}") from error


def _condition(view: str, chosen: Chosen) -> tuple[str, list[Any]]:
    parts: list[str] = ["true"]
    values: list[Any] = []
    for column, limit in (("time >=", chosen.since), ("time <", chosen.until)):
        if limit is not None:
            parts.append(f"{column} ?")
            values.append(limit)
    if chosen.policies:
        if view not in {"verdicts", "fired"}:
            raise InputError(
                "--policy: these lines are not of single policies; leave it out, or ask for "
                "policies, requests or features"
            )
        parts.append("list_contains(?, policy)")
        values.append(list(chosen.policies))
    if chosen.where:
        parts.append(f"({chosen.where})")
    return " AND ".join(parts), values


def _with_share(tables: LogTables, counted: str, chosen: Chosen, order: str) -> str | None:
    """Return a query with the share of all requests; None if --where does not hold for requests."""
    import duckdb  # noqa: PLC0415

    groups = ", ".join(f'{GROUPS[by]} AS "{by}"' for by in chosen.by)
    total = f"SELECT {groups + ', ' if groups else ''}count(*) AS requests FROM requests"
    times = " AND ".join(
        f"{column} '{limit.isoformat()}'"
        for column, limit in (("time >=", chosen.since), ("time <", chosen.until))
        if limit is not None
    )
    where = " AND ".join(
        part for part in (times, f"({chosen.where})" if chosen.where else "") if part
    )
    total += f" WHERE {where}" if where else ""
    total += " GROUP BY ALL"
    try:
        tables.connection.execute(f"EXPLAIN {total}")
    except duckdb.Error:
        return None
    same = " AND ".join(f'c."{by}" IS NOT DISTINCT FROM t."{by}"' for by in chosen.by) or "true"
    return (
        f"SELECT c.*, t.requests, round(c.matches / t.requests, 4) AS share FROM ({counted}) c "
        f"LEFT JOIN ({total}) t ON {same} ORDER BY {order}"
    )
