"""Events reach the file, are counted where they do not, and hold nothing up."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import structlog

from saeguard.events.sink import Sink


def event(i: int) -> Mapping[str, Any]:
    """Return a small event."""
    return {"event": "verdict", "i": i}


def balanced(sink: Sink) -> bool:
    """Return whether every event is accounted for."""
    return sink.produced == sink.written + sink.dropped


def test_close_drains(tmp_path: Path) -> None:
    """What was put before is in the file after, in order, one JSON object a line."""
    sink = Sink(tmp_path / "logs" / "events.jsonl")
    for i in range(500):
        sink.put(lambda i=i: event(i))
    sink.close()

    lines = [json.loads(x) for x in (tmp_path / "logs" / "events.jsonl").read_text().splitlines()]

    assert [line["i"] for line in lines] == list(range(500))
    # The format of jq's fromdateiso8601, which takes no fraction of a second.
    assert all(time.strptime(line["time"], "%Y-%m-%dT%H:%M:%SZ") for line in lines)
    assert (sink.produced, sink.written, sink.dropped) == (500, 500, 0)


def test_appends(tmp_path: Path) -> None:
    """A restart keeps what was there."""
    for i in range(2):
        sink = Sink(tmp_path / "events.jsonl")
        sink.put(lambda i=i: event(i))
        sink.close()

    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 2


def test_put_never_blocks(tmp_path: Path) -> None:
    """More than ten thousand a second with a writer that stands still; the rest is counted."""
    gate = threading.Event()
    sink = Sink(tmp_path / "events.jsonl", capacity=100)

    def held() -> Mapping[str, Any]:
        gate.wait()
        return event(-1)

    sink.put(held)
    begin = time.perf_counter()
    for i in range(20_000):
        sink.put(lambda i=i: event(i))
    took = time.perf_counter() - begin
    gate.set()
    sink.close()

    assert took < 2
    assert sink.produced == 20_001
    assert sink.written >= 101
    assert sink.dropped > 19_000
    assert balanced(sink)


def test_many_threads(tmp_path: Path) -> None:
    """Each event is counted once, whoever puts it."""
    sink = Sink(tmp_path / "events.jsonl", capacity=50)

    def work() -> None:
        for i in range(2_000):
            sink.put(lambda i=i: event(i))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sink.close()

    assert sink.produced == 16_000
    assert balanced(sink)
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == sink.written


def _write_long_lines(path: Path, name: str) -> None:
    sink = Sink(path)
    for i in range(500):
        sink.put(lambda i=i: {"from": name, "i": i, "long": "x" * (i * 40)})  # type: ignore[misc]
    sink.close()
    assert sink.written == 500


def test_two_processes_share_a_file(tmp_path: Path) -> None:
    """Lines of two engine cores, longer than any buffer, are neither torn nor lost."""
    path = tmp_path / "events.jsonl"
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=_write_long_lines, args=(path, name)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    found = [json.loads(line) for line in path.read_text().splitlines()]
    for name in "ab":
        assert [e["i"] for e in found if e["from"] == name] == list(range(500))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")  # noqa: PTH110
def test_a_full_disk_is_counted() -> None:
    """Nothing is raised, not even at the end; every event counts as dropped."""
    sink = Sink(Path("/dev/full"))
    for i in range(50):
        sink.put(lambda i=i: event(i))
    sink.close()

    assert (sink.produced, sink.written, sink.dropped) == (50, 0, 50)


def test_a_closed_pipe_is_counted(tmp_path: Path) -> None:
    """A reader that goes away costs its events, not the server."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    sink = Sink(pipe)
    os.close(reader)
    for i in range(50):
        sink.put(lambda i=i: event(i))
    sink.close()

    assert (sink.written, sink.dropped) == (0, 50)


def test_a_file_closed_under_it_is_counted(tmp_path: Path) -> None:
    """Whatever happens to the file, the sum holds."""
    sink = Sink(tmp_path / "events.jsonl")
    sink._file.close()
    sink.put(lambda: event(0))
    sink.close()

    assert (sink.written, sink.dropped) == (0, 1)


def test_an_event_that_cannot_be_built_is_counted(tmp_path: Path) -> None:
    """Its failure costs no other event."""
    sink = Sink(tmp_path / "events.jsonl")
    sink.put(lambda: event(1 // 0))
    sink.put(lambda: event(1))
    sink.close()

    assert (sink.written, sink.dropped) == (1, 1)


def test_an_event_after_close_is_counted(tmp_path: Path) -> None:
    """It is too late, but not lost sight of."""
    sink = Sink(tmp_path / "events.jsonl")
    sink.close()
    sink.put(lambda: event(0))
    sink.close()

    assert (sink.produced, sink.written, sink.dropped) == (1, 0, 1)


def test_close_gives_up_on_a_writer_that_hangs(tmp_path: Path) -> None:
    """A server that shuts down does not wait for a dead disk; what is left counts as dropped."""
    gate = threading.Event()
    sink = Sink(tmp_path / "events.jsonl", capacity=2)

    def held() -> Mapping[str, Any]:
        gate.wait()
        return event(-1)

    for _ in range(5):
        sink.put(held)
    begin = time.perf_counter()
    sink.close(timeout_s=0.1)
    took = time.perf_counter() - begin
    found = (sink.produced, sink.written, sink.dropped)
    gate.set()
    sink._thread.join(5)
    sink._file.close()

    assert took < 2
    assert found == (5, 0, 5)


def test_a_path_that_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    """Better at start-up than at the first event."""
    with pytest.raises(OSError, match="directory"):
        Sink(tmp_path)


def test_the_hosts_structlog_is_left_alone(tmp_path: Path) -> None:
    """Settings of the process belong to the process."""
    before = structlog.get_config()
    configured = structlog.is_configured()
    sink = Sink(tmp_path / "events.jsonl")
    sink.put(lambda: event(0))
    sink.close()

    assert structlog.is_configured() == configured
    assert structlog.get_config() == before
