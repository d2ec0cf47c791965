"""A log is rotated, cut off, removed, or its disk is full: no line is lost unseen or mixed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from saeguard.events.log_file import LogFile
from saeguard.events.reader import LogError, read_log, torn_lines
from saeguard.events.sink import Sink


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Of a log."""
    return tmp_path / "logs" / "events.jsonl"


def numbers(path: Path) -> list[int]:
    """Return the numbers of the lines."""
    return [json.loads(line)["i"] for line in path.read_text().splitlines()]


def put(log: LogFile, *which: int) -> None:
    """Write lines."""
    for i in which:
        log.write(json.dumps({"i": i}).encode() + b"\n")


def test_renamed(path: Path) -> None:
    """The next line goes into a new file of the name, without any signal."""
    log = LogFile(path)
    put(log, 0, 1)
    path.rename(path.with_suffix(".1"))
    put(log, 2)
    path.rename(path.with_suffix(".2"))
    path.write_text('{"i": 3}\n')  # as `create` of logrotate does
    put(log, 4)
    assert [numbers(path.with_suffix(s)) for s in (".1", ".2", ".jsonl")] == [[0, 1], [2], [3, 4]]


def test_renamed_under_two_writers(path: Path) -> None:
    """Both go on in the same new file."""
    logs = LogFile(path), LogFile(path)
    put(logs[0], 0)
    put(logs[1], 1)
    path.rename(path.with_suffix(".1"))
    put(logs[1], 2)
    put(logs[0], 3)
    assert (numbers(path.with_suffix(".1")), numbers(path)) == ([0, 1], [2, 3])


def test_copied_and_cut_off(path: Path) -> None:
    """`copytruncate`: the next line is the first, without a hole before it."""
    log = LogFile(path)
    put(log, 0, 1, 2)
    os.truncate(path, 0)
    put(log, 3)
    assert numbers(path) == [3]


@pytest.mark.parametrize("what", ["file", "folder"])
def test_removed(what: str, path: Path) -> None:
    """File or folder are made again."""
    log = LogFile(path)
    put(log, 0)
    path.unlink()
    if what == "folder":
        path.parent.rmdir()
    put(log, 1)
    assert numbers(path) == [1]


def test_renamed_and_no_other_may_be_made(path: Path) -> None:
    """The renamed file takes the lines, so none is lost; in a removed one they would be."""
    log = LogFile(path)
    other = path.with_suffix(".1")
    path.rename(other)
    path.mkdir()  # stands for a folder that this user may not write to
    put(log, 0)
    assert numbers(other) == [0]
    other.unlink()
    with pytest.raises(OSError, match="directory"):
        put(log, 1)


def test_a_line_that_is_cut_off(path: Path) -> None:
    """Whoever cut it off, the next line begins on its own."""
    path.parent.mkdir()
    path.write_text('{"i": 0}\n{"i": ')
    put(LogFile(path), 1)
    with path.open("a") as other:
        other.write('{"i":')
    log = LogFile(path)
    put(log, 2, 3)
    with path.open("a") as other:
        other.write('{"i": 4}\n')
    put(log, 5)
    lines = path.read_text().splitlines()
    assert lines == ['{"i": 0}', '{"i": ', '{"i": 1}', '{"i":', '{"i": 2}', '{"i": 3}',
                     '{"i": 4}', '{"i": 5}']  # fmt: skip


FULL = """
import resource, signal, sys
from pathlib import Path
from saeguard.events.sink import Sink
path = Path(sys.argv[1])
sink = Sink(path)
def put(*which):
    for i in which:
        sink.put(lambda i=i: {"i": i, "long": "x" * 100})
    while sink.produced != sink.written + sink.dropped:
        pass
put(0, 1)
room = path.stat().st_size + 60  # half a line: what a disk has left
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
put(2, 3, 4)
assert path.stat().st_size == room, path.stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
put(5, 6)
sink.close()
print(sink.produced, sink.written, sink.dropped)
"""


def test_a_disk_that_is_full_for_a_while(path: Path) -> None:
    """The torn line counts as dropped, swallows none that follows, and the log tells of the loss.

    A limit on the file's size cuts a write off as a full disk does.
    """
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1:] == ["7 4 3"], done.stderr
    lines = path.read_text().splitlines()
    assert [json.loads(line)["i"] for line in lines if line.endswith("}")] == [0, 1, 5, 6]
    assert len(lines) == 5
    assert "events are lost" in done.stdout + done.stderr
    assert "events are written again" in done.stdout + done.stderr


def test_reading_skips_torn_lines(path: Path) -> None:
    """They are counted; a whole line that is no event is refused, and so is a file without any."""
    sink = Sink(path)
    sink.put(lambda: {"event": "request.refused", "schema": "saeguard.event/v3", "model": "m",
                      "tenant": None, "reason": "r"})  # fmt: skip
    sink.close()
    whole = path.read_bytes()
    path.write_bytes(b'{"event": "ver' + whole + b"\0\0\0\n" + whole + b"\xff\n\n" + whole[:-9])
    torn: list[int] = []
    assert list(read_log(path, torn)) == []
    assert torn == [1, 2, 4]
    assert torn_lines(torn).startswith("3 torn lines were skipped (the first: 1)")
    path.write_bytes(whole + b'{"event": "verdict"}\n')
    with pytest.raises(LogError, match=r"events\.jsonl:2: verdict\.schema"):
        list(read_log(path))
    path.write_text("no log\nat all\n")
    with pytest.raises(LogError, match=r"jsonl:1: expected a JSON object; is this an event log\?"):
        list(read_log(path))
