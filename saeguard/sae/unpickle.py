"""The child process of `saeguard sae convert`, which extracts the tensors of a pickle.

`python -m saeguard.sae.unpickle SOURCE FOLDER` writes `raw.safetensors` and `values.json`.
`torch.load(weights_only=True)` runs no code of a pickle. A flaw might let it run code. So the
process has no network and starts no processes, as far as the system allows, and its memory, time
and output are limited.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TENSORS = "raw.safetensors"
VALUES = "values.json"
SECONDS = 900
"""Seconds of processor time."""
SPARE = 2 << 30
"""Bytes of address space beyond the libraries' and three times the file's."""
MAX_ENTRIES = 256
MAX_DEPTH = 3
_NEW_USER_AND_NETWORK = 0x10000000 | 0x40000000  # CLONE_NEWUSER | CLONE_NEWNET, linux/sched.h
_REFUSED = (
    "socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "ctypes.dlopen",
)  # fmt: skip


def main(source: Path, folder: Path) -> None:
    """Write the tensors of the pickle; exit with a message if they cannot be read."""
    import torch  # noqa: PLC0415 - its libraries are mapped before the bounds are set
    from safetensors.torch import save_file  # noqa: PLC0415

    size = source.stat().st_size
    _confine(size)
    try:
        loaded = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - whatever a hostile file brings about
        lines = str(error).splitlines() or [type(error).__name__]
        reason = next(
            (line for line in lines if "GLOBAL" in line or "nsupported" in line), lines[0]
        )
        sys.exit(f"not a pickle of plain tensors: {reason.strip()[:300]}")
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    _collect(loaded, "", tensors, values, 0)
    total = 0
    for name, tensor in tensors.items():
        total += _checked(name, tensor)
    if total > 2 * size:
        sys.exit(f"tensors of {total} bytes in a file of {size}: views of the same memory")
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / TENSORS
    )
    (folder / VALUES).write_text(json.dumps(values))


def _confine(size: int) -> None:
    """Cut this process off from network, files and children, as far as the system allows."""
    # Fails if user namespaces are forbidden; the audit hook below holds all the same.
    ctypes.CDLL(None, use_errno=True).unshare(_NEW_USER_AND_NETWORK)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    for what, bound in (
        (resource.RLIMIT_AS, mapped + 3 * size + SPARE),
        (resource.RLIMIT_CPU, SECONDS),
        (resource.RLIMIT_FSIZE, 2 * size + (1 << 20)),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (bound, bound))
    sys.addaudithook(_refuse)


def _refuse(event: str, _: object) -> None:
    if event.startswith(_REFUSED):
        # Not an exception, which what is being read could catch.
        os.write(2, f"the file tried {event}; nothing was run\n".encode())
        os._exit(3)


def _collect(
    loaded: Any, prefix: str, tensors: dict[str, Any], values: dict[str, Any], depth: int
) -> None:
    import torch  # noqa: PLC0415

    if not isinstance(loaded, Mapping):
        sys.exit(f"holds a {type(loaded).__name__}; a dictionary of tensors is needed")
    if depth > MAX_DEPTH or len(loaded) + len(tensors) + len(values) > MAX_ENTRIES:
        sys.exit(f"more than {MAX_ENTRIES} entries or {MAX_DEPTH} levels: no SAE's state")
    for key, value in loaded.items():
        name = f"{prefix}{key}"
        if isinstance(value, torch.Tensor):
            if value.dim() == 0 and value.layout == torch.strided:
                values[name] = value.item()
            elif value.is_floating_point() or value.is_sparse or value.is_quantized:
                tensors[name] = value
            # Counters and sizes of groups are not needed to encode.
        elif isinstance(value, Mapping):
            # The usual wrapper around a state dictionary is not part of the tensors' names.
            inner = "" if key in {"state_dict", "model_state_dict"} else f"{name}."
            _collect(value, inner, tensors, values, depth + 1)
        elif value is None or isinstance(value, bool | int | str):
            values[name] = value
        elif isinstance(value, float):
            values[name] = value if math.isfinite(value) else str(value)


def _checked(name: str, tensor: Any) -> int:
    """Return a tensor's bytes; exit if it is not a plain dense tensor."""
    import torch  # noqa: PLC0415

    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        sys.exit(f"{name}: a sparse, quantised or absent tensor; save it dense")
    size = tensor.numel() * tensor.element_size()
    if size > tensor.untyped_storage().nbytes():
        sys.exit(f"{name}: {size} bytes over a memory of {tensor.untyped_storage().nbytes()}")
    return int(size)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
