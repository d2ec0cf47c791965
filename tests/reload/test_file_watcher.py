"""Changes of real files are noticed, whatever the system reports of them."""

from __future__ import annotations

import os
import queue
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from saeguard.reload import file_watcher
from saeguard.reload.file_watcher import Look, contents, fingerprint, looks

TIMEOUT_S = 20


class Watched:
    """A thread that watches a folder, as the compiler process does."""

    def __init__(self, folder: Path) -> None:
        """Start it; the folder was looked at before this returns."""
        self.stop = threading.Event()
        self.looks: queue.Queue[Look] = queue.Queue()
        seen = looks([folder], self.stop)
        self.thread = threading.Thread(target=self._run, args=(seen,), daemon=True)
        self.thread.start()

    def _run(self, seen: Iterator[Look]) -> None:
        for look in seen:
            self.looks.put(look)

    def until(self, what: Callable[[Look], bool]) -> Look:
        """Wait for a look."""
        while not what(look := self.looks.get(timeout=TIMEOUT_S)):
            pass
        return look


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A policy file in a folder."""
    file = tmp_path / "policies" / "one.yaml"
    file.parent.mkdir()
    file.write_text("above: 0.25\n")
    return file


@pytest.fixture
def watched(file: Path) -> Iterator[Watched]:
    """Its folder, watched."""
    watched = Watched(file.parent)
    yield watched
    watched.stop.set()


def edit_in_place(file: Path) -> None:
    """Write other content of the same size, and put the time of the last write back."""
    status = file.stat()
    with file.open("r+") as stream:
        stream.write("above: 0.75\n")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    now = file.stat()
    assert (now.st_ino, now.st_size, now.st_mtime_ns) == (
        status.st_ino, status.st_size, status.st_mtime_ns,
    )  # fmt: skip


def test_an_edit_that_keeps_size_and_time(file: Path, watched: Watched) -> None:
    """`rsync --inplace` and `cp -p` change the entry's own time, which no program can set."""
    before = fingerprint([file.parent])
    edit_in_place(file)
    assert fingerprint([file.parent]) != before
    assert watched.until(lambda look: look.changed).changed


def test_an_edit_that_no_time_shows(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file system keeps no such time, the content is compared."""
    seen = contents([file.parent])
    monkeypatch.setattr(file_watcher, "marks", lambda status: (status.st_size, 0, 0, 0))
    monkeypatch.setattr(file_watcher, "CONTENT_S", 0.1)
    monkeypatch.setattr(file_watcher, "LOOK_S", 0.2)
    watched = Watched(file.parent)
    edit_in_place(file)
    assert watched.until(lambda look: look.changed).changed
    watched.stop.set()
    assert contents([file.parent]) != seen


@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "nowhere", "huge"])
def test_what_is_no_file(kind: str, file: Path) -> None:
    """Whatever else has the name of a policy file, its content is not waited for."""
    other = file.with_name("other.yaml")
    match kind:
        case "pipe":
            os.mkfifo(other)
        case "folder":
            other.mkdir()
        case "loop":
            other.symlink_to(other)
        case "nowhere":
            other.symlink_to("/nowhere")
        case _:
            with other.open("wb") as stream:
                stream.truncate(1 << 40)
    watched = Watched(file.parent)
    edit_in_place(file)
    assert watched.until(lambda look: look.changed).changed
    watched.stop.set()


def test_a_panic_of_the_notifier(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Rust panic is no `Exception`: the files are compared, and it is tried again."""

    class Panic(BaseException):
        """As pyo3 raises it."""

    began: list[int] = []

    def watch(*_roots: Path, **_options: object) -> Iterator[None]:
        began.append(1)
        raise Panic("poisoned lock")
        yield

    monkeypatch.setattr("watchfiles.watch", watch)
    monkeypatch.setattr(file_watcher, "LOOK_S", 0.05)
    monkeypatch.setattr(file_watcher, "RETRY_S", 0.2)
    watched = Watched(file.parent)
    edit_in_place(file)
    assert watched.until(lambda look: look.changed) == Look(True, "Panic: poisoned lock")
    while len(began) < 3:
        watched.until(lambda look: not look.changed)
    watched.stop.set()


NO_INOTIFY = """
import os, resource, sys, threading
from pathlib import Path
import watchfiles
from saeguard.reload import file_watcher
file_watcher.LOOK_S = 0.2
folder = Path(sys.argv[1])
seen = file_watcher.looks([folder], threading.Event())
last = os.open("/dev/null", os.O_RDONLY)
resource.setrlimit(resource.RLIMIT_NOFILE, (last + 3, last + 3))  # EMFILE, as with no instance left
print(next(seen), flush=True)
(folder / "one.yaml").write_text("above: 0.9\\n")
print(next(look for look in seen if look.changed), flush=True)
"""


def test_no_inotify_instance_is_left(file: Path) -> None:
    """The files are compared, changes are found, and why is said."""
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 64
    done = subprocess.run(
        [sys.executable, "-c", NO_INOTIFY, str(file.parent)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    first, second = done.stdout.splitlines()
    assert (done.returncode, "Too many open files" in first) == (0, True), done.stderr
    assert second.startswith("Look(changed=True, compared_only=")
