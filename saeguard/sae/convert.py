"""Convert a checkpoint to safetensors with one row per latent, and record its origin.

The only way by which a pickle's tensors get in: a child process takes them out
(`saeguard.sae.unpickle`), this one only reads the safetensors file it leaves.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import IO

import numpy as np
import torch

from saeguard.sae.checkpoint import PICKLES, as_stated, inspect
from saeguard.sae.checkpoint_info import Part, SaeInfo, Stated, file_sha256
from saeguard.sae.errors import SaeError
from saeguard.sae.files import read_json, read_safetensors
from saeguard.sae.formats import converted, pickled
from saeguard.sae.formats.source import Source
from saeguard.sae.tensors import DTYPES, Stored, TensorFile
from saeguard.sae.unpickle import TENSORS, VALUES
from saeguard.sae.weights import read_headers

BLOCK_BYTES = 64 << 20
"""Bytes of a matrix that are held at once."""
SECONDS = 3600
"""After so many seconds the child that reads a pickle is ended."""


def convert(
    source: str | Path,
    folder: str | Path,
    *,
    stated: Stated | None = None,
    config: str | Path | None = None,
    revision: str | None = None,
) -> SaeInfo:
    """Convert the checkpoint `source` into the new folder `folder`.

    Args:
        source: a pickle (`.pt`, `.pth`, `.bin`), or a folder that `inspect` reads.
        folder: must not exist; it appears complete or not at all.
        stated: what the user states, for what the files leave open.
        config: configuration of a pickle; by default `config.json` beside it, if there is one.
        revision: of the repository that the source is from, for the record.

    Raises:
        SaeError: the source cannot be read rightly, or `folder` exists.
    """
    source, folder = Path(os.path.abspath(source)), Path(os.path.abspath(folder))  # noqa: PTH100 - links keep the published name
    if folder.exists():
        raise SaeError(f"{folder}: exists already; name a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        if source.suffix in PICKLES and source.is_file():
            info, origin = _unpickled(source, Path(scratch), stated or Stated(), config)
        else:
            info = inspect(source, stated)
            origin = info.weights
        _write(info, made / converted.WEIGHTS, Path(scratch))
        record = converted.Provenance(
            source=origin.name,
            sha256=file_sha256(origin),
            config_sha256=info.config_sha256,
            revision=revision,
            converter=version("saeguard"),
            operations=_operations(info, origin),
        )
        text = json.dumps(converted.document(info, record), indent=2)
        (made / converted.CONFIG).write_text(text + "\n", encoding="utf-8")
        inspect(made)
        made.rename(folder)
    return inspect(folder)


def _operations(info: SaeInfo, origin: Path) -> list[str]:
    parts = (info.layout.W_enc, info.layout.W_dec)
    turned = [part.name for part in parts if part.axis == 1]
    return [
        *(["tensors taken out of the pickle"] if origin.suffix in PICKLES else []),
        *([f"{' and '.join(turned)} transposed to one row a latent"] if turned else []),
        "values kept as stored, nothing folded",
    ]


def _unpickled(
    source: Path, scratch: Path, stated: Stated, config: str | Path | None
) -> tuple[SaeInfo, Path]:
    beside = source.parent / "config.json"
    config = Path(config) if config else beside if beside.is_file() else None
    try:
        child = subprocess.run(  # noqa: S603 - our own module, no shell
            [sys.executable, "-m", "saeguard.sae.unpickle", source, scratch],
            env={
                "PATH": os.defpath,
                "PYTHONPATH": os.pathsep.join(sys.path),
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise SaeError(f"{source}: not read within {SECONDS} seconds") from error
    if child.returncode:
        lines = child.stderr.strip().splitlines() or [f"it was ended by signal {-child.returncode}"]
        raise SaeError(
            f"{source}: cannot be converted: {lines[-1][:500]}. Only dictionaries of dense tensors "
            "are read; get the file from its publisher again, or save its state_dict"
        )
    found = Source(
        folder=source,
        weights=read_safetensors(scratch / TENSORS),
        config_file=config,
        config=read_json(config) if config else {},
        stated=stated,
    )
    values = json.loads((scratch / VALUES).read_text())
    info = pickled.describe(found, source.as_posix(), values)
    return as_stated(info, stated), source


def _write(info: SaeInfo, file: Path, scratch: Path) -> None:
    """Write the tensors that the layout names; matrices get one row per latent."""
    layout = info.layout
    matrices = [layout.W_enc] if info.transcoder else [layout.W_enc, layout.W_dec]
    vectors = [
        name
        for name in dict.fromkeys(
            (layout.b_enc, layout.subtract, layout.b_dec, layout.threshold, layout.r_mag,
             layout.b_mag)
        )
        if isinstance(name, str)
    ]  # fmt: skip
    source = read_headers(info.weights)
    if info.transcoder:
        vectors = [name for name in vectors if name in source.tensors and name != layout.b_dec]
    shapes: dict[str, tuple[int, ...]] = {p.name: (info.d_sae, info.d_in) for p in matrices}
    shapes |= {name: source.tensors[name].shape for name in vectors}
    header, at = {}, 0
    for name, shape in shapes.items():
        dtype = source.tensors[name].dtype
        end = at + int(np.prod(shape)) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(encoded)) + encoded)
        for part in matrices:
            with _plain(source, part.name, scratch) as matrix:
                _write_rows(out, matrix, part, info)
        for name in vectors:
            out.write(_bytes(source.all(name)))
        out.flush()
        os.fsync(out.fileno())


def _write_rows(out: IO[bytes], matrix: TensorFile, part: Part, info: SaeInfo) -> None:
    width = info.d_in * DTYPES[matrix.tensors[part.name].dtype].itemsize
    step = max(1, BLOCK_BYTES // width)
    for start in range(0, info.d_sae, step):
        rows = matrix.take(part.name, range(start, min(start + step, info.d_sae)), part.axis)
        out.write(_bytes(rows))


@contextmanager
def _plain(source: TensorFile, name: str, scratch: Path) -> Iterator[TensorFile]:
    """Inflate a compressed member once, since every block would inflate all of it again."""
    stored = source.tensors[name]
    if stored.member is None:
        yield source
        return
    inflated = scratch / "inflated"
    with (
        zipfile.ZipFile(source.path) as archive,
        archive.open(stored.member) as member,
        inflated.open("wb") as out,
    ):
        shutil.copyfileobj(member, out, 4 << 20)
    plain = Stored(stored.dtype, stored.shape, stored.offset, stored.column_major)
    yield replace(source, path=inflated, tensors={name: plain})
    inflated.unlink()


def _bytes(tensor: torch.Tensor) -> bytes:
    out: bytes = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return out
