"""Large arrays lie in a file that vanishes; small ones in memory; the values are the same."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from saeguard.features import room
from saeguard.features.corpus import join
from tests.features.planted import corpus


def test_on_disk_as_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of a corpus, and two joined, hold the same residuals; no file is left."""
    texts = corpus("search")
    odd = texts.label.copy()
    expected = join(texts.select(odd), texts.select(~odd)).x
    monkeypatch.setattr(room, "IN_MEMORY", 64)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    found = join(texts.select(odd), texts.select(~odd)).x

    assert torch.equal(found, expected)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The room is reserved before anything is written, and the message says how much."""

    def full(*_: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("os.posix_fallocate", full)

    with pytest.raises(room.RoomError, match=r"no room for 3\.0 GiB of residuals: No space left"):
        room.allocate(3 << 20, 256)
