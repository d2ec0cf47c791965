"""Open a weight file by the ending of its name."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from saeguard.file_marks import marks
from saeguard.sae.files import read_safetensors
from saeguard.sae.npz import read_npz
from saeguard.sae.tensors import TensorFile


def read_headers(file: Path) -> TensorFile:
    """Read the headers of a safetensors or npz file, remembered while it is unchanged.

    Raises:
        SaeError: it is damaged.
    """
    return _headers(file, marks(file.stat()))


@lru_cache(maxsize=64)
def _headers(file: Path, key: tuple[int, ...]) -> TensorFile:
    """Read headers; the marks are only there to key the cache."""
    del key
    return read_npz(file) if file.suffix == ".npz" else read_safetensors(file)
