"""What file systems and editors leave among the policies is named, bounded, never waited for."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from saeguard.events.record_schema import LINE, Reload
from saeguard.events.records import reload_event
from saeguard.reload.compiler_process import read
from saeguard.reload.file_watcher import fingerprint, looks
from saeguard.reload.policy_source import ReadCache, Source
from saeguard.yaml_files.findings import MOST_CHARACTERS
from tests import models


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """A policy and its feature set."""
    models.write_feature_set(
        tmp_path / "sets" / "tiny.yaml", models.make_sae(tmp_path / "sae"), latents=(0,)
    )
    models.write_policy(
        tmp_path / "policies" / "one.yaml",
        detect={"a": {"feature": "f0", "above": 0.5}}, condition="a",
    )  # fmt: skip
    return Source(tmp_path / "policies", tmp_path / "sets")


def error_of(source: Source) -> str | None:
    """Return what a reading says, after it went through an event."""
    done: list[str | None] = []

    def run() -> None:
        done.append(read(source, ReadCache(), "files")[0].error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert done, "the reading hangs"
    event = reload_event(
        {"outcome": "refused", "trigger": "files", "old": "", "new": None, "error": done[0],
         "policies": 1, "revision": None, "read_ms": 0.0, "swap_ms": 0.0, "encoder_rows": 0},
        model="m",
    )  # fmt: skip
    line = LINE.validate_json(json.dumps(event).encode())
    assert isinstance(line, Reload)
    (done[0] or "").encode()  # a terminal can show it
    return done[0]


def deep(folder: Path) -> None:
    """Make folders below each other, more than Python can recurse into."""
    before = Path.cwd()
    try:
        os.chdir(folder)
        for _ in range(1_200):
            Path("d").mkdir()
            os.chdir("d")
    finally:
        os.chdir(before)


HARMLESS: dict[str, Callable[[Path], object]] = {
    "vim's swap file": lambda f: (f / ".one.yaml.swp").write_bytes(b"b0VIM\0\xff"),
    "Emacs' lock": lambda f: (f / ".#one.yaml").symlink_to("user@host.1:2"),
    "Emacs' autosave": lambda f: (f / "#one.yaml#").write_text("half"),
    "a backup": lambda f: (f / "one.yaml~").write_text("old"),
    "the Finder's": lambda f: (f / ".DS_Store").write_bytes(b"\0\0\0\1Bud1"),
    "a text": lambda f: (f / "README.md").write_text("# Policies"),
    "an empty folder": lambda f: (f / "new").mkdir(),
    "a pipe of another name": lambda f: os.mkfifo(f / "pipe"),
}


@pytest.mark.parametrize("left", HARMLESS)
def test_what_editors_leave(left: str, source: Source) -> None:
    """It is no policy, and nothing is said of it."""
    HARMLESS[left](source.policies)
    assert error_of(source) is None


def in_place_of(file: Path, make: Callable[[Path], object]) -> None:
    """Remove a file, and make something else of its name."""
    file.unlink()
    make(file)


def tiny(source: Source) -> Path:
    """Return the feature set's file."""
    return source.feature_sets / "tiny.yaml"


def sae(source: Source, name: str) -> Path:
    """Return a file of the SAE."""
    return source.feature_sets.parent / "sae" / name


def not_utf8(source: Source) -> None:
    """Write a policy whose name is not UTF-8 and would colour a terminal."""
    name = os.fsdecode(bytes(source.policies / "bad") + b"\xff\x1b[31m.yaml")
    Path(name).write_text("{")


REFUSED: dict[str, tuple[Callable[[Source], object], str]] = {
    "a name that is not UTF-8": (not_utf8, "bad"),
    "a policy that is a pipe": (lambda s: os.mkfifo(s.policies / "two.yaml"), "two.yaml"),
    "a set that is a pipe": (lambda s: in_place_of(tiny(s), os.mkfifo), "not a regular file"),
    "a set that is a device": (
        lambda s: in_place_of(tiny(s), lambda f: f.symlink_to("/dev/zero")), "not a regular file",
    ),
    "a set without end": (lambda s: os.truncate(tiny(s), 1 << 40), "tiny.yaml"),
    "a configuration that is a pipe": (
        lambda s: in_place_of(sae(s, "cfg.json"), os.mkfifo), "cfg.json",
    ),
    "mistakes in 500 files": (
        lambda s: [(s.policies / f"{i}.yaml").write_text("schema: [") for i in range(500)],
        "more lines",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(kind: str, source: Source) -> None:
    """The message names it, is short, and holds nothing that steers a terminal."""
    make, said = REFUSED[kind]
    make(source)
    error = error_of(source)
    assert error is not None
    assert said in error
    assert len(error) <= MOST_CHARACTERS + 300
    assert all(c.isprintable() or c == "\n" for c in error)


def test_folders_below_folders(source: Source) -> None:
    """The watch goes on, however deep they are."""
    deep(source.policies)
    try:
        assert fingerprint([source.policies]) is not None
        assert next(looks([source.policies], threading.Event())).changed is False
        assert error_of(source) is None or "long" in str(error_of(source))
    finally:  # `shutil.rmtree`, with which pytest clears old folders, recurses and fails
        subprocess.run(["rm", "-rf", source.policies], check=True)
