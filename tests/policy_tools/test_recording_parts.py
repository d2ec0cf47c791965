"""A recording that is written text by text is the one that is written at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from saeguard.errors import InputError
from saeguard.hf.texts import Text
from saeguard.part_files import PartFiles
from saeguard.policy_tools import recording_parts
from saeguard.policy_tools.record_features import Recorded
from saeguard.policy_tools.recording import Recording, read_recording, write_recording

DEFINITIONS = {"demo/a": "1", "demo/b": "2"}


def texts(*, roles: bool, with_text: bool) -> list[Recorded]:
    """Return three texts of 1 to 3 tokens."""
    rng = np.random.default_rng(1)
    return [
        Recorded(
            Text(f"t{n}", tuple(range(n)), n - 1),
            rng.normal(size=(n, 2)).astype(np.float32),
            np.arange(n) > 0,
            np.arange(n) == 1,
            np.full(n, 5, np.uint8) if roles else None,
            tuple("xyz"[:n]) if with_text else None,
        )
        for n in (1, 2, 3)
    ]


@pytest.mark.parametrize("roles", [True, False])
@pytest.mark.parametrize("with_text", [True, False])
def test_it_reads_as_one_written_at_once(tmp_path: Path, *, roles: bool, with_text: bool) -> None:
    """Values, roles, ids and texts; the part files go."""
    given = texts(roles=roles, with_text=with_text)
    out = tmp_path / "a.safetensors"
    parts = PartFiles(out, recording_parts.SECTIONS, {}, resume=False)
    for text in given:
        recording_parts.add(parts, text)
    no_roles = "" if roles else "no chat template"
    counts = recording_parts.write(parts, DEFINITIONS, model="tiny", no_roles=no_roles)
    assert counts == (3, 6)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    at_once = Recording(
        path=out,
        model="tiny",
        ids=("t1", "t2", "t3"),
        lengths=np.array([1, 2, 3]),
        prompt_tokens=np.array([0, 1, 2]),
        evaluable=np.concatenate([text.evaluable for text in given]),
        massive=np.concatenate([text.massive for text in given]),
        definitions=DEFINITIONS,
        values=np.concatenate([text.values for text in given]),
        roles=np.full(6, 5, np.uint8) if roles else None,
        no_roles=no_roles,
        pieces=tuple("xxyxyz") if with_text else None,
    )
    other = tmp_path / "b.safetensors"
    write_recording(at_once, other)
    ours, theirs = read_recording(out), read_recording(other)
    for name in ("lengths", "prompt_tokens", "evaluable", "massive", "values", "roles"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    for name in ("ids", "model", "definitions", "pieces"):
        assert getattr(ours, name) == getattr(theirs, name)
    if not roles:
        assert ours.no_roles == "no chat template"


def test_a_header_that_readers_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused when it is written, with what to do."""
    monkeypatch.setattr(recording_parts, "LARGEST_HEADER", 100)
    parts = PartFiles(tmp_path / "a", recording_parts.SECTIONS, {}, resume=False)
    for text in texts(roles=True, with_text=True):
        recording_parts.add(parts, text)
    with pytest.raises(InputError, match="record fewer texts or leave out --with-text"):
        recording_parts.write(parts, DEFINITIONS, model="tiny", no_roles="")
    parts.close()
