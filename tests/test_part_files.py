"""A result grows on disk; whatever cuts a run off, the next one goes on from a whole item."""

from __future__ import annotations

from pathlib import Path

import pytest

from saeguard.errors import InputError
from saeguard.part_files import INDEX, PartFiles

ABOUT = {"texts": "abc", "dtype": "float32"}


def parts(out: Path, *, resume: bool = False, **about: str) -> PartFiles:
    """Open the part files of a result with two sections."""
    return PartFiles(out, ["a", "b"], {**ABOUT, **about}, resume=resume)


def test_a_finished_result_is_whole(tmp_path: Path) -> None:
    """The section takes the result's name, and the folder goes."""
    out = tmp_path / "out.jsonl"
    out.write_text("old")
    with_two = parts(out)
    with_two.add(b"one\n", b"1")
    assert out.read_text() == "old"
    with_two.add(b"two\n", b"")
    with_two.finish(with_two.path("a"))
    with_two.close()
    assert out.read_text() == "one\ntwo\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_run_goes_on_after_the_last_whole_item(tmp_path: Path) -> None:
    """What was written of an item without its index entry is cut away, as is a torn entry."""
    out = tmp_path / "out"
    first = parts(out)
    first.add(b"one", b"1")
    first.add(b"two", b"22")
    first.close()
    assert not out.exists()
    with first.path("b").open("ab") as file:
        file.write(b"thr")
    with (first.folder / INDEX).open("ab") as file:
        file.write(b"torn")
    again = parts(out, resume=True)
    assert again.items == 2
    again.add(b"three", b"3")
    again.flush()
    assert again.path("a").read_bytes() == b"onetwothree"
    assert again.path("b").read_bytes() == b"1223"
    again.close()


def test_a_section_that_lost_its_end_loses_the_item(tmp_path: Path) -> None:
    """A machine that went down can leave an index ahead of a section."""
    first = parts(tmp_path / "out")
    first.add(b"one", b"1")
    first.add(b"two", b"2")
    first.close()
    first.path("a").write_bytes(b"onet")
    again = parts(tmp_path / "out", resume=True)
    assert again.items == 1
    again.flush()
    assert (again.path("a").read_bytes(), again.path("b").read_bytes()) == (b"one", b"1")
    again.close()


def test_nothing_is_left_of_a_run_without_items(tmp_path: Path) -> None:
    """A run that failed at once leaves no folder to remove."""
    parts(tmp_path / "out").close()
    assert list(tmp_path.iterdir()) == []


def test_only_the_same_result_goes_on(tmp_path: Path) -> None:
    """An earlier run is neither overwritten nor mixed with another; the message says what to do."""
    out = tmp_path / "out"
    first = parts(out)
    first.add(b"one", b"1")
    with pytest.raises(InputError, match="--resume"):
        parts(out)
    with pytest.raises(InputError, match="another process writes there"):
        parts(out, resume=True)
    first.close()
    with pytest.raises(InputError, match="another dtype: found 'float32', expected 'bfloat16'"):
        parts(out, resume=True, dtype="bfloat16")
    parts(out, resume=True).close()
    assert first.path("a").read_bytes() == b"one"
