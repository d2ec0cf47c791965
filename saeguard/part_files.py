"""Results that grow item by item on disk, so that a long run can be cut off and go on.

The folder `OUT.part` holds the sections of the result, each one file, and an index of where each
item ends in each section. An item counts once its index entry is written. What lies behind the last
whole item is cut away when the run goes on.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from saeguard.errors import InputError

ABOUT, INDEX = "about.json", "index"
FLUSHED_ITEMS = 64
"""Items between flushes; a run that is killed repeats at most so many."""


class PartFiles:
    """The growing sections of one result."""

    def __init__(
        self, out: Path, sections: Sequence[str], about: Mapping[str, Any], *, resume: bool
    ) -> None:
        """Start a result, or go on with one.

        Args:
            out: the file that the result will be.
            sections: names of its sections.
            about: what the result depends on; a run goes on only with the same.
            resume: go on with what an earlier run left, if it left anything.

        Raises:
            InputError: an earlier run left items and `resume` is not set, it was about something
                else, another process is writing this result, or `out` is a folder.
        """
        if out.is_dir():
            raise InputError(f"{out}: expected a file to write, found a folder; name a file")
        self.out = out
        self.folder = out.with_name(f"{out.name}.part")
        self.sections = tuple(sections)
        self.items = 0
        """Number of whole items."""
        self._files = ExitStack()
        found = self._files.enter_context(begin(self.folder, about, resume=resume))
        self._index = self._open(INDEX)
        self._section = [self._open(name) for name in self.sections]
        self._ends = self._cut_to_whole_items() if found else [0] * len(self.sections)

    def path(self, section: str) -> Path:
        """Return the file of a section."""
        return self.folder / section

    def add(self, *parts: bytes) -> None:
        """Append one item: a part for each section, in their order."""
        for i, (file, part) in enumerate(zip(self._section, parts, strict=True)):
            file.write(part)
            self._ends[i] += len(part)
        self._index.write(np.array(self._ends, np.int64).tobytes())
        self.items += 1
        if self.items % FLUSHED_ITEMS == 0:
            self.flush()

    def flush(self) -> None:
        """Hand what was added to the system, the sections first."""
        for file in (*self._section, self._index):
            file.flush()

    def finish(self, whole: Path) -> None:
        """Make the file `whole`, which holds all, the result; remove the others."""
        self.flush()
        with whole.open("rb") as file:
            os.fsync(file.fileno())
        whole.replace(self.out)
        self.remove()

    def close(self) -> None:
        """End writing; what was added stays for another run, nothing stays if there is no item."""
        if not self.folder.exists():  # it is finished
            return
        self.flush()
        self._files.close()
        if not self.items:
            self.remove()

    def remove(self) -> None:
        """Remove the folder."""
        self._files.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _open(self, name: str) -> IO[bytes]:
        return self._files.enter_context((self.folder / name).open("ab"))

    def _cut_to_whole_items(self) -> list[int]:
        """Cut the sections to the items that all of them hold, and return where they end."""
        width = 8 * len(self.sections)
        raw = (self.folder / INDEX).read_bytes()
        ends = np.frombuffer(raw[: len(raw) // width * width], np.int64)
        ends = ends.reshape(-1, len(self.sections))
        sizes = [(self.folder / name).stat().st_size for name in self.sections]
        self.items = int((ends <= sizes).all(axis=1).sum())
        last = ends[self.items - 1].tolist() if self.items else [0] * len(self.sections)
        self._index.truncate(self.items * width)
        for file, end in zip(self._section, last, strict=True):
            file.truncate(end)
        return list(last)


@contextmanager
def begin(folder: Path, about: Mapping[str, Any], *, resume: bool) -> Iterator[bool]:
    """Hold the folder of a result that grows, and yield whether an earlier run began it.

    Args:
        folder: made if it is missing.
        about: what the result depends on; a run goes on only with the same.
        resume: go on with what an earlier run left, if it left anything.

    Raises:
        InputError: an earlier run left something and `resume` is not set, it was about something
            else, or another process is writing there.
    """
    found = _earlier(folder, about, resume=resume)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ABOUT).open("a") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"{folder}: another process writes there; wait for it") from error
        held.truncate(0)
        held.write(json.dumps(dict(about), indent=1) + "\n")
        held.flush()
        yield found


def _earlier(folder: Path, about: Mapping[str, Any], *, resume: bool) -> bool:
    """Return whether an earlier run left items that this one goes on with."""
    file = folder / ABOUT
    if not file.is_file():
        return False
    if not resume:
        raise InputError(
            f"{folder}: an earlier run was cut off; go on with --resume, or remove the "
            "folder to begin anew"
        )
    try:
        before = json.loads(file.read_text())
    except ValueError as error:
        raise InputError(f"{file}: {error}; remove the folder to begin anew") from error
    now = json.loads(json.dumps(dict(about)))
    differing = sorted(key for key in before.keys() | now if before.get(key) != now.get(key))
    if differing:
        key = differing[0]
        raise InputError(
            f"--resume: {folder} was made with another {key}: found {before.get(key)!r}, "
            f"expected {now.get(key)!r}; give the same as then, or remove the folder to begin "
            "anew"
        )
    return True
