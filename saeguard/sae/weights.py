"""Open a weight file by the ending of its name."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from saeguard.sae.files import read_safetensors
from saeguard.sae.npz import read_npz
from saeguard.sae.tensors import TensorFile


def read_headers(file: Path) -> TensorFile:
    """Read the headers of a safetensors or npz file, remembered while it is unchanged.

    Raises:
        SaeError: it is damaged.
    """
    stat = file.stat()
    return _headers(file, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)
def _headers(file: Path, size: int, mtime_ns: int) -> TensorFile:
    """Read headers; size and time of change are only there to key the cache."""
    del size, mtime_ns
    return read_npz(file) if file.suffix == ".npz" else read_safetensors(file)
