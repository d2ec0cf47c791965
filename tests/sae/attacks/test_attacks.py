"""Hostile checkpoints are refused with the file and the reason; nothing runs, nothing swells."""

from __future__ import annotations

import os
import pickle
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from saeguard.sae import SaeError, inspect, read_decoder_rows, read_rows
from saeguard.sae.convert import convert
from tests.sae.attacks.make import ATTACKS, D, N, npy, npz, sound

SECONDS = 20
GROWTH = 64 << 20
"""Bytes that a refusal may add to the process' peak."""


def _read_all(path: Path) -> None:
    info = inspect(path)
    read_rows(info, range(info.d_sae))
    read_decoder_rows(info, range(info.d_sae))


@pytest.mark.parametrize("name", list(ATTACKS))
def test_refused(tmp_path: Path, name: str) -> None:
    """Each is refused in bounded time and memory, by a message that names a path in the folder."""
    make, says = ATTACKS[name]
    folder = tmp_path / "sae"
    folder.mkdir()
    path = make(folder) or folder
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start = time.monotonic()
    with pytest.raises(SaeError, match=says) as caught:
        _read_all(path)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert time.monotonic() - start < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - peak < GROWTH


def test_there_are_enough() -> None:
    """At least 40, besides the pickles below."""
    assert len(ATTACKS) >= 40


def test_the_sound_ones_are_read(tmp_path: Path) -> None:
    """What the attacks change is read where nothing is changed: the refusals are the attacks'."""
    sound(tmp_path)
    _read_all(tmp_path)


def test_a_compressed_member_that_is_damaged(tmp_path: Path) -> None:
    """A member whose checksum is wrong is refused when it is read."""
    import numpy as np

    folder = tmp_path / "layer_1" / "width_64" / "average_l0_5"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    arrays = {"W_enc": (D, N), "W_dec": (N, D), "b_enc": (N,), "b_dec": (D,), "threshold": (N,)}
    np.savez_compressed(
        folder / "params.npz",
        **{name: rng.random(shape).astype(np.float32) for name, shape in arrays.items()},
    )
    content = bytearray((folder / "params.npz").read_bytes())
    for at in range(2000, 2050):
        content[at] ^= 0x55
    (folder / "params.npz").write_bytes(content)
    with pytest.raises(SaeError, match=r"params\.npz"):
        _read_all(folder)


class _Canary:
    """Writes a file when it is unpickled by a loader that runs code."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.file}",))


class TestPickles:
    """`convert` reads pickles without running them; nothing else reads them at all."""

    def test_code_does_not_run(self, tmp_path: Path) -> None:
        """A pickle with code is refused, in torch's format and as a bare pickle."""
        canary = tmp_path / "canary"
        state = {"W_enc": torch.ones(D, N), "x": _Canary(canary)}
        torch.save(state, tmp_path / "torch.pt")
        (tmp_path / "bare.bin").write_bytes(pickle.dumps(state))
        for name in ("torch.pt", "bare.bin"):
            with pytest.raises(SaeError, match=rf"{name}: cannot be converted") as caught:
                convert(tmp_path / name, tmp_path / "out")
            assert "Traceback" not in str(caught.value)
        # The canary is real: the loader that everybody warns of sets it off.
        assert not canary.exists()
        pickle.loads((tmp_path / "bare.bin").read_bytes())  # noqa: S301 - that is the point
        assert canary.exists()
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("state", "says"),
        [
            ([1, 2], "holds a list"),
            ({"W_enc": torch.ones(D, N).to_sparse()}, "sparse"),
            ({"W_enc": torch.ones(1).expand(1 << 40)}, "bytes over a memory of"),
            ({f"t{i}": torch.ones(1) for i in range(300)}, "more than 256 entries"),
            ({"a": {"b": {"c": {"d": {"e": torch.ones(1)}}}}}, "3 levels"),
            ({"W_enc": torch.ones(D, N, device="meta")}, "absent tensor|cannot be converted"),
        ],
    )
    def test_what_is_no_state(self, tmp_path: Path, state: Any, says: str) -> None:
        """Whatever is no dictionary of dense tensors is refused by name."""
        torch.save(state, tmp_path / "sae.pt")
        with pytest.raises(SaeError, match=says):
            convert(tmp_path / "sae.pt", tmp_path / "out")

    def test_the_child_has_no_network_and_no_children(self) -> None:
        """Were code to run all the same, it could not connect or start anything."""
        import subprocess
        import sys

        for attempt in (
            "import socket; socket.create_connection(('127.0.0.1', 9))",
            "import os; os.system('true')",
            "import subprocess; subprocess.run(['true'])",
        ):
            code = f"from saeguard.sae import unpickle; unpickle._confine(1 << 20)\n{attempt}"
            done = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=False
            )
            assert done.returncode == 3, done.stderr
            assert "the file tried" in done.stderr

    def test_the_childs_memory_is_bounded(self) -> None:
        """An allocation far beyond the file's size fails in the child."""
        import subprocess
        import sys

        code = (
            "import torch\nfrom saeguard.sae import unpickle; unpickle._confine(1 << 20)\n"
            "torch.ones(4 << 30, dtype=torch.uint8)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        assert done.returncode
        assert "memory" in done.stderr


def test_npz_helpers_make_sound_files(tmp_path: Path) -> None:
    """A hand-made archive with all arrays is read, so that the npz refusals are the attacks'."""
    from tests.sae.attacks.make import arrays

    def write(archive: Any) -> None:
        for name, array in arrays().items():
            archive.writestr(f"{name}.npy", npy(array))

    _read_all(npz(tmp_path, write))
