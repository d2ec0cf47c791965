"""Event logs as tables: any schema version, rotated, compressed, cut off, followed."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from saeguard.errors import InputError
from saeguard.events.follow import Follower
from saeguard.events.log_tables import COLUMNS, LogTables, log_files
from saeguard.events.questions import GROUPS, QUESTIONS, Chosen, ask, moment
from saeguard.events.record_schema import LINE, json_schema
from tests.cli.project import run
from tests.events.sample_log import new_lines, old_lines, outcomes, text_of, write_sample

pytest.importorskip("duckdb")


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the sample log, and go to its folder."""
    monkeypatch.chdir(tmp_path)
    write_sample(tmp_path)
    return Path("events.jsonl")


def tables(log: Path) -> LogTables:
    """Return the tables of a log with its rotated files."""
    return LogTables(log_files([log], rotated=True))


def test_the_sample_is_a_log() -> None:
    """What these tests ask about is what a server writes; keys of later schemas are left out."""
    parts = {
        part["properties"]["event"]["const"]: part["properties"]
        for part in json_schema()["$defs"].values()
        if "event" in part.get("properties", ())
    }
    known = [line for line in [*old_lines(), *new_lines()] if line["event"] in parts]
    assert len(known) > 40
    for line in known:
        keys = parts[line["event"]]
        LINE.validate_python({k: v for k, v in line.items() if k in keys})


def test_every_key_is_a_column() -> None:
    """A key that the schema gains is not lost."""
    keys = {
        key
        for part in json_schema()["$defs"].values()
        if "event" in part.get("properties", ())
        for key in part["properties"]
    }
    assert keys - {"threshold"} <= COLUMNS.keys()


def test_both_kinds_of_log_count_the_same(log: Path) -> None:
    """A line for each verdict, or one a request: requests, matches, coverage are the same."""
    numbers = range(21, 41)
    expected = [
        sum(outcomes(n)[policy] == "match" for n in numbers)
        for policy in ("code.shell", "code.secret")
    ]
    chosen = Chosen(since=moment("2026-11-29T09:00"))
    found = ask(tables(log), "policies", chosen)
    assert [row[found.columns.index("matches")] for row in found.rows] == expected
    assert {row[found.columns.index("requests")] for row in found.rows} == {len(numbers)}

    [unjudged] = ask(tables(log), "unjudged", Chosen()).rows
    whole = [o for n in range(1, 41) for o in outcomes(n).values()]
    assert unjudged[:4] == (40, 80, 0, whole.count("not_evaluated"))


@pytest.mark.parametrize("question", QUESTIONS)
def test_every_question_in_every_group(log: Path, question: str) -> None:
    """Each question is answered by each group that it takes, and refuses the others in words."""
    found = tables(log)
    assert ask(found, question, Chosen()).rows
    for group in GROUPS:
        if not QUESTIONS[question].grouped:
            with pytest.raises(InputError, match="--by"):
                ask(found, question, Chosen(by=(group,)))
        elif group == "watchlist" and question == "refusals":
            with pytest.raises(InputError, match="watchlist"):
                ask(found, question, Chosen(by=(group,)))
        else:
            assert ask(
                found, question, Chosen(by=(group, "day") if group != "day" else ("day",))
            ).rows


def test_chosen_lines(log: Path) -> None:
    """By time, policy and a condition; what the condition says of verdicts alone has no share."""
    found = tables(log)
    answer = ask(found, "requests", Chosen(policies=("code.secret",), where="tenant = 'bank'"))
    assert {row[2:4] for row in answer.rows} == {("bank", "code.secret")}
    until = ask(found, "requests", Chosen(until=moment("2026-11-29T09:00")))
    assert {row[0].hour for row in until.rows} == {8}
    assert "share" in ask(found, "policies", Chosen(where="tenant = 'bank'")).columns
    assert "share" not in ask(found, "policies", Chosen(where="score > 2")).columns
    with pytest.raises(InputError, match=r"the query is refused: .*nowhere"):
        ask(found, "policies", Chosen(where="nowhere = 1"))
    with pytest.raises(InputError, match="--policy: these lines are not of single policies"):
        ask(found, "reloads", Chosen(policies=("code.secret",)))


def test_moments() -> None:
    """Ago, or a date in UTC."""
    now = datetime(2026, 11, 29, 12, tzinfo=UTC)
    assert moment("90m", now) == datetime(2026, 11, 29, 10, 30, tzinfo=UTC)
    assert moment("7d", now) == datetime(2026, 11, 22, 12, tzinfo=UTC)
    assert moment("2026-11-29") == datetime(2026, 11, 29, tzinfo=UTC)
    assert moment("2026-11-29T08:00:00Z") == datetime(2026, 11, 29, 8, tzinfo=UTC)
    with pytest.raises(InputError, match="expected a time such as"):
        moment("yesterday")


def test_rotated_files(log: Path) -> None:
    """What log rotation makes of a log belongs to it; other files beside it do not."""
    for name in ("events.jsonl-20261128", "events.jsonl-20261127.zst", "events.jsonl.2.gz",
                 "events.jsonl.bak", "events.jsonlx", "other.jsonl.1"):  # fmt: skip
        Path(name).touch()
    names = [file.name for file in log_files([log], rotated=True)]
    assert names == [
        "events.jsonl-20261127.zst", "events.jsonl-20261128", "events.jsonl.1.gz",
        "events.jsonl.2.gz", "events.jsonl",
    ]  # fmt: skip
    assert log_files([log, log], rotated=False) == [log]
    Path("events.jsonl.bz2").touch()
    for wrong, says in (
        ("gone", "no such file"),
        (".", "found a folder"),
        ("events.jsonl.bz2", "decompress"),
    ):
        with pytest.raises(InputError, match=says):
            log_files([Path(wrong)], rotated=False)


def test_lines_that_are_no_events(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are counted, not passed over in silence; a line under way is none of them."""
    before = tables(log).count("SELECT count(*) FROM lines")
    with log.open("a") as file:
        file.write("{broken\n" + text_of(new_lines()) + '{"event": "verd')
    found = tables(log)
    assert found.count("SELECT count(*) FROM lines") > before
    assert found.unread == 1
    assert run("events", "policies", str(log)) == 0
    assert "not an event, and passed over: 1 line\n" in capsys.readouterr().err

    Path("other.jsonl").write_text('{"text": "x"}\n')
    assert run("events", "policies", "other.jsonl") == 2
    assert "found no event; is this the log that --events names?" in capsys.readouterr().err


def test_a_fault_of_the_guard_is_always_told(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever was asked."""
    with log.open("a") as file:
        file.write('{"event": "ledger_mismatch", "schema": "saeguard.event/v2"}\n')
    assert run("events", "reloads", str(log)) == 0
    assert "the tokens of 1 request do not add up" in capsys.readouterr().err


def test_forms(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON, CSV and Parquet hold the same rows."""
    from pyarrow import parquet

    ask_ = ("events", "policies", str(log), "--by", "tenant")
    assert run(*ask_, "--format", "json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert run(*ask_, "--format", "csv") == 0
    lines = capsys.readouterr().out.splitlines()
    assert (len(lines) - 1, lines[0].split(",")) == (len(rows), list(rows[0]))
    assert run(*ask_, "--format", "parquet", "--out", "p.parquet") == 0
    assert parquet.read_table("p.parquet").to_pylist() == rows
    assert run(*ask_, "--format", "csv", "--out", "p.csv") == 0
    assert Path("p.csv").read_text().splitlines() == lines


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("policies events.jsonl --format parquet", "--out: parquet needs a file"),
        ("policies events.jsonl --by week", "--by: found 'week'; allowed: hour"),
        ("sql events.jsonl", "--query: expected with the question sql"),
        ("policies events.jsonl --query x", "--query: expected with the question sql"),
        ("policies events.jsonl --since now", "expected a time such as"),
        ("policies events.jsonl --follow --out x", "--follow: it prints"),
        ("reloads events.jsonl --by hour", "--by: reloads lists single lines"),
    ],
)
def test_wrong_commands(
    log: Path, capsys: pytest.CaptureFixture[str], arguments: str, says: str
) -> None:
    """Each is told with what to do."""
    assert log.exists()
    assert run("events", *arguments.split()) == 2
    assert says in capsys.readouterr().err


def test_a_misspelt_policy_is_named(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It looks like one that never fires; the answer says which ids there are."""
    assert run("events", "policies", str(log), "--policy", "code.secrte") == 0
    said = capsys.readouterr().err
    assert 'no line is of the policy "code.secrte"' in said
    assert 'did you mean "code.secret"?' in said
    assert run("events", "policies", str(log), "--policy", "code.secret") == 0
    assert "no line is of" not in capsys.readouterr().err


def test_ctrl_c_within_a_query(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DuckDB reports it as an error of its own; it is Ctrl-C all the same."""
    found = tables(log)

    class Interrupted:
        def execute(self, *_: object) -> None:
            raise RuntimeError("Query interrupted")

    monkeypatch.setattr(found, "connection", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        found.count("SELECT 1")


def test_followed_lines(log: Path) -> None:
    """Whole lines only, each once, also across both ways of rotation."""
    follower = Follower(log)
    assert follower.read() == b""
    with log.open("a") as file:
        file.write("one\ntw")
    assert follower.read() == b"one\n"
    with log.open("a") as file:
        file.write("o\n")
    log.rename("events.jsonl.9")
    with Path("events.jsonl.9").open("a") as file:
        file.write("three\n")
    assert follower.read() == b"two\nthree\n"
    log.write_text("four\n")
    assert follower.read() == b"four\n"
    log.write_text("5\n")  # copied and truncated
    assert follower.read() == b"5\n"
    follower.close()


def test_follow(log: Path) -> None:
    """A log that grows is answered anew."""
    command = [sys.executable, "-m", "saeguard", "events", "refusals", str(log), "--follow"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    running = subprocess.Popen(
        [*command, "--format", "csv"], stdout=subprocess.PIPE, env=env, text=True, bufsize=1
    )
    assert running.stdout is not None
    first = [running.stdout.readline() for _ in range(2)]
    assert first[1].split(",")[2] == "1"
    *_, refusal = new_lines()
    with log.open("a") as file:
        file.write(json.dumps(refusal) + "\n")
    again = [running.stdout.readline() for _ in range(2)]
    running.send_signal(2)
    assert again[1].split(",")[2] == "2"
    assert running.wait(30) == 0


def test_a_large_rotated_log_is_not_held_as_text(tmp_path: Path) -> None:
    """A hundred thousand lines are read by DuckDB, compressed."""
    text = text_of(old_lines()) * 2500
    with gzip.open(tmp_path / "e.jsonl.1.gz", "wt", compresslevel=1) as file:
        file.write(text)
    (tmp_path / "e.jsonl").write_text("")
    began = time.monotonic()
    found = tables(tmp_path / "e.jsonl")
    assert found.count("SELECT count(*) FROM lines") == text.count("\n")
    assert time.monotonic() - began < 120  # a slip into Python would take far longer
