"""Read the arrays of an npz file in parts: a zip archive of `.npy` members.

Stored members, as `numpy.savez` writes them, lie in the file as they are and are read by `pread`.
Compressed ones can only be inflated from their beginning: every read then costs a pass over the
member, though never more memory than a few megabytes. `saeguard sae convert` makes either into
rows that are read at once.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from saeguard.sae.tensors import Stored, TensorFile
from saeguard.sae.zip_member import refused

MAX_DIRECTORY = 64 << 10
"""Bytes of the archive's list of members; an SAE's has five."""
MAX_NPY_HEADER = 4096
_DTYPES = {"<f8": "F64", "<f4": "F32", "<f2": "F16"}
_LOCAL_HEADER = struct.Struct("<26xHH")
_TAIL = 22 + 0xFFFF + 76
"""Bytes in which the end of an archive lies: its record, a comment, the records of zip64."""


def read_npz(file: Path) -> TensorFile:
    """Read the headers of an npz file.

    Raises:
        SaeError: it is damaged, or holds anything but plain arrays.
    """
    try:
        _check_end(file)
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            names = [member.filename for member in members]
            if len(set(names)) != len(names):
                raise refused(file, "a member is there twice")
            tensors = {}
            for member in members:
                name = member.filename.removesuffix(".npy")
                if name == member.filename or not name.isidentifier():
                    raise refused(file, f"member {member.filename[:80]!r} is not a `name.npy`")
                tensors[name] = _stored(file, archive, member)
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise refused(file, str(error)) from error
    return TensorFile(file, tensors)


def _check_end(file: Path) -> None:
    """Refuse an archive whose directory is large, before `zipfile` reads all of it."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        stream.seek(max(0, size - _TAIL))
        tail = stream.read(_TAIL)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) < at + 22:
        raise refused(file, "it does not end as a zip archive does")
    (directory,) = struct.unpack_from("<I", tail, at + 12)
    zip64 = at - 20 - 56  # where the records of large archives lie, and where `zipfile` looks
    if zip64 >= 0 and tail[zip64 : zip64 + 4] == b"PK\x06\x06":
        (directory,) = struct.unpack_from("<Q", tail, zip64 + 40)
    if directory > MAX_DIRECTORY:
        raise refused(file, f"a directory of {directory} bytes; at most {MAX_DIRECTORY} are read")


def _stored(file: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Stored:
    """Return offset, shape and layout of one array in the file."""
    name = member.filename
    if member.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        raise refused(file, f"{name}: compression method {member.compress_type}")
    if member.flag_bits & 1:
        raise refused(file, f"{name}: encrypted")
    with archive.open(member) as stream:
        dtype, shape, column_major, header = _npy_header(file, name, stream)
    item = np.dtype(dtype)
    if item.hasobject:
        raise refused(file, f"{name}: an array of objects, which is a pickle and never read")
    data = header + math.prod(shape) * item.itemsize
    if data != member.file_size:
        raise refused(file, f"{name}: {member.file_size} bytes for {dtype} of {list(shape)}")
    kind = _DTYPES.get(item.str, item.str)
    if member.compress_type == zipfile.ZIP_DEFLATED:
        return Stored(kind, shape, header, column_major, name)
    with file.open("rb") as raw:
        raw.seek(member.header_offset)
        name_length, extra_length = _LOCAL_HEADER.unpack(raw.read(_LOCAL_HEADER.size))
    start = member.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    if start + data > file.stat().st_size:
        raise refused(file, f"{name}: it ends behind the end of the file")
    return Stored(kind, shape, start + header, column_major)


def _npy_header(
    file: Path, name: str, stream: IO[bytes]
) -> tuple[np.dtype[np.generic], tuple[int, ...], bool, int]:
    """Return dtype, shape, whether column-major, and the bytes before the data."""
    npy: Any = np.lib.format  # without annotations
    start = io.BytesIO(stream.read(MAX_NPY_HEADER))
    try:
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[
            npy.read_magic(start)
        ]
        shape, column_major, dtype = read(start, max_header_size=MAX_NPY_HEADER)
    except (ValueError, KeyError, TypeError, EOFError, MemoryError, RecursionError) as error:
        raise refused(file, f"{name}: its header is no array's ({error})") from error
    if any(type(size) is not int or not 0 <= size < 1 << 63 for size in shape):
        raise refused(file, f"{name}: shape {list(shape)}")
    return dtype, tuple(shape), bool(column_major), start.tell()
