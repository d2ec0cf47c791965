"""Event logs as tables of DuckDB: lines of any schema version, plain, rotated or compressed."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saeguard.errors import InputError

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

COLUMNS: dict[str, str] = {
    "event": "VARCHAR",
    "schema": "VARCHAR",
    "time": "TIMESTAMPTZ",
    "model": "VARCHAR",
    "request_id": "VARCHAR",
    "tenant": "VARCHAR",
    "finished": "VARCHAR",
    "watchlist": "VARCHAR",
    "policy": "VARCHAR",
    "policy_digest": "VARCHAR",
    "mode": "VARCHAR",
    "severity": "VARCHAR",
    "verdict": "VARCHAR",
    "action": "VARCHAR",
    "acted": "VARCHAR",
    "score": "DOUBLE",
    "first_token": "BIGINT",
    "matched_tokens": "BIGINT",
    "features": 'MAP(VARCHAR, STRUCT("count" BIGINT, "max" DOUBLE, "at" BIGINT))',
    "coverage": "STRUCT(tokens BIGINT, evaluated BIGINT, skipped MAP(VARCHAR, BIGINT))",
    "exception": "VARCHAR",
    "error": "VARCHAR",
    "approximate": "BOOLEAN",
    "policies": "BIGINT",
    "verdicts": "MAP(VARCHAR, BIGINT)",
    "outcome": "VARCHAR",
    "trigger": "VARCHAR",
    "old": "VARCHAR",
    "new": "VARCHAR",
    "revision": "BIGINT",
    "read_ms": "DOUBLE",
    "swap_ms": "DOUBLE",
    "encoder_rows": "BIGINT",
    "came": "VARCHAR[]",
    "vanished": "VARCHAR[]",
    "changed": "VARCHAR[]",
    "feature_sets": "VARCHAR[]",
    "no_longer_enforced": "VARCHAR[]",
    "reason": "VARCHAR",
}
"""The keys of all kinds of lines; a test compares them with the schema."""
VIEWS = """
CREATE VIEW verdicts AS
  SELECT time, request_id, model, tenant, policy, mode, severity, verdict, action, acted, score,
    first_token, matched_tokens, coverage.tokens AS tokens, coverage.evaluated AS evaluated,
    coverage.skipped AS skipped, features, exception, error, approximate, finished,
    watchlist[:12] AS watchlist, policy_digest[:12] AS policy_digest
  FROM lines WHERE event = 'verdict';
CREATE VIEW requests AS
  -- Logs of schema v2 have no line of a request; its widest verdict stands for it.
  SELECT max(time) AS time, request_id, any_value(model) AS model, any_value(tenant) AS tenant,
    any_value(finished) AS finished, any_value(watchlist[:12]) AS watchlist,
    coalesce(max(policies), count(*) FILTER (event = 'verdict')) AS policies,
    max_by(coverage, {'whole': event = 'request', 'tokens': coverage.tokens}) AS coverage,
    {outcomes}
  FROM lines WHERE event IN ('verdict', 'request') GROUP BY request_id;
CREATE VIEW fired AS
  SELECT * EXCLUDE (features, entry), entry.key AS feature, entry.value."count" AS tokens_above,
    entry.value."max" AS share, entry.value."at" AS at_token
  FROM (SELECT *, unnest(map_entries(features)) AS entry FROM verdicts);
CREATE VIEW skipped AS
  SELECT * EXCLUDE (coverage, entry), entry.key AS reason, entry.value AS skipped_tokens
  FROM (SELECT *, unnest(map_entries(coverage.skipped)) AS entry FROM requests);
CREATE VIEW reloads AS
  SELECT time, model, outcome, trigger, policies, revision, came, vanished, changed, feature_sets,
    no_longer_enforced, error, old[:12] AS old, new[:12] AS new, read_ms, swap_ms, encoder_rows
  FROM lines WHERE event = 'policy.reload';
CREATE VIEW refusals AS
  SELECT time, model, tenant, reason FROM lines WHERE event = 'request.refused';
"""
OUTCOMES = ("match", "no_match", "error", "not_evaluated")
ROTATED = re.compile(r"[.-][0-9][0-9TZ._-]*(\.(gz|zst))?|\.(gz|zst)")
"""What log rotation adds to a name: `.1`, `.2.gz`, `-20261129`, `-20261129.zst`."""
COMPRESSED = re.compile(r"\.(bz2|xz|zip)$")


def log_files(paths: Sequence[Path], *, rotated: bool) -> list[Path]:
    """Return the files of some logs, each once, oldest first as far as names tell.

    Args:
        paths: of logs.
        rotated: add the files that log rotation made of them.

    Raises:
        InputError: a file is missing, a folder, or compressed in a way that cannot be read.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if not path.is_file():
            what = "expected a file, found a folder" if path.is_dir() else "there is no such file"
            raise InputError(f"{path}: {what}; name the log that the server writes (--events)")
        if COMPRESSED.search(path.name):
            raise InputError(f"{path}: expected plain lines, .gz or .zst; decompress it first")
        others = path.parent.iterdir() if rotated else ()
        older = [
            other
            for other in others
            if other.name.startswith(path.name)
            and ROTATED.fullmatch(other.name.removeprefix(path.name))
        ]
        for file in [*sorted(older), path]:
            found.setdefault(file)
    return list(found)


class LogTables:
    """The lines of some logs, and views of them: see `VIEWS`."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Read the lines.

        Raises:
            InputError: the files hold no event.
            ModuleNotFoundError: DuckDB is not installed.
        """
        import duckdb  # noqa: PLC0415 - of the extra `tables`

        self.connection: DuckDBPyConnection = duckdb.connect()
        self.connection.execute("SET TimeZone = 'UTC'")
        columns = ", ".join(f'"{name}" {type_}' for name, type_ in COLUMNS.items())
        self.connection.execute(f"CREATE TABLE lines ({columns}, file VARCHAR)")
        outcomes = ", ".join(
            f"coalesce(max(verdicts['{o}']), count(*) FILTER (verdict = '{o}')) AS {o}"
            for o in OUTCOMES
        )
        self.connection.execute(VIEWS.replace("{outcomes}", outcomes))
        self.unread = 0
        """Lines that are not events; the last line of a log may be under way, and is none."""
        self.add(files)
        if not self.count("SELECT count(*) FROM lines"):
            names = ", ".join(map(str, files))
            raise InputError(f"{names}: found no event; is this the log that --events names?")

    def add(self, files: Iterable[Path]) -> None:
        """Add the lines of further files."""
        names = [str(file) for file in files]
        types = ", ".join(f"'{name}': '{type_}'" for name, type_ in COLUMNS.items())
        self.execute(
            "CREATE OR REPLACE TEMP TABLE added AS SELECT * FROM read_json($1, filename = true, "
            f"format = 'newline_delimited', columns = {{{types}}}, ignore_errors = true)",
            [names],
        )
        self.execute("INSERT INTO lines SELECT * FROM added WHERE event IS NOT NULL")
        self.unread += self.count("SELECT count(*) FROM added WHERE event IS NULL")
        self.unread -= sum(_is_cut_off(Path(name)) for name in names)

    def add_lines(self, lines: bytes) -> None:
        """Add whole lines that a server has appended to a log."""
        with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
            file.write(lines)
            file.flush()
            self.add([Path(file.name)])

    def count(self, query: str) -> int:
        """Return the number that a query selects."""
        found: Any = self.execute(query).fetchone()
        return int(found[0])

    def execute(self, query: str, values: Sequence[Any] = ()) -> Any:
        """Run a query.

        Raises:
            KeyboardInterrupt: Ctrl-C has ended it, which DuckDB reports as an error of its own.
            duckdb.Error: DuckDB refuses it.
        """
        try:
            return self.connection.execute(query, list(values))
        except RuntimeError as error:
            if "interrupted" in str(error).lower():
                raise KeyboardInterrupt from error
            raise


def _is_cut_off(path: Path) -> bool:
    """Return whether the last line of a plain file is incomplete, since a server is writing it."""
    if path.suffix in {".gz", ".zst"} or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"
