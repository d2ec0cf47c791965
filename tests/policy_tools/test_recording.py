"""Recordings: what is written is what is read, and what is none is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from saeguard.features.files import read_feature_set_file
from saeguard.policy_tools.recording import (
    SCHEMA,
    Recording,
    RecordingError,
    definition,
    read_recording,
    write_recording,
)
from tests.guard.test_probes import PROBES, probes_alone

MADE = Recording(
    path=Path("r.safetensors"),
    model="tiny",
    ids=("a", "b"),
    lengths=np.array([2, 3]),
    prompt_tokens=np.array([1, 0]),
    evaluable=np.array([False, True, True, True, True]),
    definitions={"s/x": "1", "s/y": "2"},
    values=np.arange(10, dtype=np.float32).reshape(5, 2),
    pieces=("a", "b", "c", "\n", "é"),
)


@pytest.mark.parametrize("pieces", [MADE.pieces, None])
def test_written_and_read(tmp_path: Path, pieces: tuple[str, ...] | None) -> None:
    """Nothing is lost, and nothing of the text is kept unless it is given."""
    path = tmp_path / "deep" / "r.safetensors"
    write_recording(replace(MADE, pieces=pieces), path)

    read = read_recording(path)

    assert (read.ids, read.model, read.definitions, read.pieces) == (
        MADE.ids,
        MADE.model,
        MADE.definitions,
        pieces,
    )
    for name in ("lengths", "prompt_tokens", "evaluable", "values"):
        np.testing.assert_array_equal(getattr(read, name), getattr(MADE, name))
    assert read.span(1) == slice(2, 5)
    assert [p.name for p in path.parent.iterdir()] == ["r.safetensors"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lengths": np.array([2, 2])}, r"evaluable: found shape \[5\], expected \[4\]"),
        ({"lengths": np.array([0, 5])}, "a text is empty"),
        ({"prompt_tokens": np.array([3, 0])}, "its prompt is longer than the text"),
        ({"ids": ("a", "a")}, "two texts have one id"),
        ({"values": MADE.values[:, :1]}, r"values: found shape \[5, 1\], expected \[5, 2\]"),
        ({"pieces": ("a",)}, "pieces: found shape"),
        ({"roles": np.zeros(4, np.uint8)}, r"roles: found shape \[4\], expected \[5\]"),
        ({"roles": np.full(5, 7, np.uint8)}, "a token's role is 7, 6 is the last"),
    ],
)
def test_parts_that_do_not_fit(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    """A recording whose parts contradict each other is refused, with file and both values."""
    write_recording(replace(MADE, **change), tmp_path / "r.safetensors")

    with pytest.raises(RecordingError, match=rf"r\.safetensors: this is no recording: .*{says}"):
        read_recording(tmp_path / "r.safetensors")


@pytest.mark.parametrize("metadata", [None, {"schema": "other/v1"}, {"schema": SCHEMA}])
def test_other_safetensors(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    """Any other file of that kind is refused."""
    save_file({"x": np.zeros(2)}, tmp_path / "x.safetensors", metadata=metadata)

    with pytest.raises(RecordingError, match=r"x\.safetensors: "):
        read_recording(tmp_path / "x.safetensors")


@pytest.mark.parametrize("content", [b"", b"{}", b"\x00" * 64])
def test_no_safetensors(tmp_path: Path, content: bytes) -> None:
    """So is a file of no such kind, and one that is not there."""
    (tmp_path / "x.safetensors").write_bytes(content)

    for name in ("x.safetensors", "gone.safetensors"):
        with pytest.raises(RecordingError, match=f"{re.escape(name)}: this is no recording"):
            read_recording(tmp_path / name)


def test_layers_belong_to_what_a_probe_is_made_of(tmp_path: Path) -> None:
    """With equal weights on another layer the values are others, and a recording does not hold."""
    sets = [
        probes_alone(tmp_path / str(layer), {"early": replace(PROBES["early"], layers=(layer,))})
        for layer in (0, 1)
    ]

    one, other = (definition(read_feature_set_file(s.path), "early") for s in sets)

    assert sets[0].features["early"].probe.sha256 == sets[1].features["early"].probe.sha256
    assert one != other
