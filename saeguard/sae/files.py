"""Open files of a checkpoint that may be hostile: sizes, links and headers before content."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saeguard.real_path import real_path
from saeguard.sae.errors import SaeError
from saeguard.sae.tensors import DTYPES, Stored, TensorFile

MAX_JSON_BYTES = 1 << 20
MAX_HEADER_BYTES = 1 << 20
"""An SAE has a dozen tensors; the format itself allows 100 MB of header."""
MAX_RANK = 4
HUB_REPOSITORY = "models--"
"""How Hugging Face's cache names a repository's folder; its snapshots link to blobs in it."""


def regular(folder: Path, name: str) -> Path:
    """Return the file `name` of a checkpoint folder.

    Raises:
        SaeError: it is missing, no regular file, or a link that leaves the folder (or, in Hugging
            Face's cache, its repository).
    """
    file = folder / name
    if not file.is_file():
        what = "is not a regular file" if file.exists() or file.is_symlink() else "is missing"
        raise SaeError(f"{file}: {what}; {found_in(folder)}")
    real = real_path(file)
    inside = next(
        (p for p in (folder, *folder.parents) if p.name.startswith(HUB_REPOSITORY)), folder
    )
    if not real.is_relative_to(inside):
        raise SaeError(
            f"{file}: a link to {real}, which is outside of the checkpoint; copy the file there, "
            "or give the folder that holds it"
        )
    return file


def found_in(folder: Path) -> str:
    """Return the names of a folder's entries, for messages."""
    names = sorted(entry.name for entry in folder.iterdir())
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""  # noqa: PLR2004 - enough to tell
    return f"found {', '.join(names[:8]) or 'nothing'}{more}"


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object, without repeated keys and numbers that JSON does not have.

    Raises:
        SaeError: the file is not a JSON object, or larger than `MAX_JSON_BYTES`.
    """
    size = file.stat().st_size
    if size > MAX_JSON_BYTES:
        raise SaeError(f"{file}: {size} bytes; at most {MAX_JSON_BYTES} are read")
    return parse_json(file, file.read_bytes())


def parse_json(file: Path, content: bytes) -> dict[str, Any]:
    """Parse a JSON object of `file`, with the checks of `read_json`."""
    try:
        parsed = json.loads(
            content.decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant
        )
    except (ValueError, RecursionError) as error:
        raise SaeError(f"{file}: not JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise SaeError(f"{file}: holds a {type(parsed).__name__}; a JSON object is needed")
    return parsed


def read_safetensors(file: Path) -> TensorFile:
    """Read the header of a safetensors file and check it against the file.

    The format: a length, a JSON object of that length, the tensors without gaps
    (https://huggingface.co/docs/safetensors/index#format).

    Raises:
        SaeError: it is no complete safetensors file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if len(start) < 8:  # noqa: PLR2004 - the length's own
            raise _damaged(file, f"it has {size} bytes")
        (length,) = struct.unpack("<Q", start)
        if length > size - 8:
            raise _damaged(file, f"its header claims {length} bytes, the file has {size}")
        if length > MAX_HEADER_BYTES:
            raise _damaged(file, f"a header of {length} bytes; at most {MAX_HEADER_BYTES} are read")
        header = stream.read(length)
    try:
        entries = parse_json(file, header)
    except SaeError as error:
        raise _damaged(file, f"its header: {str(error).removeprefix(f'{file}: ')}") from error
    entries.pop("__metadata__", None)
    data = 8 + length
    end = 0
    tensors = {}
    for name, entry in sorted(entries.items(), key=lambda item: _begin(file, *item)):
        stored = _stored(file, name, entry, data, end)
        end = entry["data_offsets"][1]
        tensors[name] = stored
    if data + end != size:
        raise _damaged(file, f"its tensors end at byte {data + end}, the file at {size}")
    return TensorFile(file, tensors)


def _stored(file: Path, name: str, entry: Mapping[str, Any], data: int, end: int) -> Stored:
    """Check one entry of a header; each tensor must begin at the end of the one before."""
    dtype, shape = entry.get("dtype"), entry.get("shape")
    begin, stop = entry["data_offsets"]
    if not isinstance(dtype, str) or not isinstance(shape, list) or not all(map(_size, shape)):
        raise _damaged(file, f"{name}: dtype {dtype!r} and shape {shape!r} are no tensor's")
    if len(shape) > MAX_RANK:
        raise _damaged(file, f"{name}: {len(shape)} dimensions")
    if begin != end or stop < begin:
        raise _damaged(
            file, f"{name}: data_offsets [{begin}, {stop}], but the tensor before it ends at {end}"
        )
    if dtype in DTYPES and stop - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise _damaged(file, f"{name}: {stop - begin} bytes for {dtype} of shape {shape}")
    return Stored(dtype, tuple(shape), data + begin)


def _begin(file: Path, name: str, entry: Any) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_size, offsets)):  # noqa: PLR2004 - begin and end
        raise _damaged(file, f"{name}: data_offsets {offsets!r} are not two sizes")
    return offsets[0], offsets[1]


def _size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _damaged(file: Path, why: str) -> SaeError:
    return SaeError(
        f"{file}: not a complete safetensors file: {why}; copy or download it again. A pickle "
        "under this name is read by `saeguard sae convert` only"
    )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"the key {key[:80]!r} is repeated")
        out[key] = value
    return out


def _constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
