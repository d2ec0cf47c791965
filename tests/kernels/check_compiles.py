"""Child of test_kernels.py: every kernel, compiled for NVIDIA GPUs without having one.

The launches are those that the guard makes, caught before they reach a device.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from saeguard.guard.kernels import tap, topk, topk_buffers
from saeguard.guard.topk import RankedRows, make_ranked
from saeguard.sae import EncoderRows, encoder_in_memory
from saeguard.sae.encode_triton import encode_into

SPILLS = 64
"""Bytes a thread that may go to memory: scans and reductions outside the products take some."""
TARGETS = {80: 3, 90: 1, 100: 3}
"""Compute capabilities (A100, H100, B200), and of how many launches one is compiled for it."""
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def launches() -> dict[str, tuple[JITFunction[Any], dict[str, Any], dict[str, Any]]]:
    """Return each kind of launch by name: kernel, arguments, options."""
    seen: dict[str, tuple[JITFunction[Any], dict[str, Any], dict[str, Any]]] = {}

    def catch(kernel: JITFunction[Any], *args: Any, **kwargs: Any) -> None:
        del kwargs["grid"], kwargs["warmup"]
        given = dict(zip(kernel.arg_names, args, strict=False))
        given |= {name: kwargs.pop(name) for name in list(kwargs) if name in kernel.arg_names}
        fixed = [f"{p.name}={given[p.name]}" for p in kernel.params if p.is_constexpr]
        kinds = [TYPES[v.dtype] for v in given.values() if isinstance(v, torch.Tensor)]
        seen[" ".join([kernel.__name__, *fixed, *kinds])] = kernel, given, kwargs

    with mock.patch.object(JITFunction, "run", catch):
        for rows, second in ((300, True), (300, False), (3, True)):
            guard(torch.bfloat16, rows, second=second)
    return seen


def guard(dtype: torch.dtype, rows: int, *, second: bool) -> None:
    """Launch all that the guard does in a pass, and a full encode."""
    d_in, latents, watched = 96, 400, [1, 2, 3]
    hidden = torch.zeros(rows, d_in, dtype=dtype)
    residual = hidden if second else None
    W = torch.randn(latents, d_in).to(dtype if rows > 16 else torch.float32)
    mine = EncoderRows(W[:3].float(), torch.zeros(3), torch.zeros(3))
    f, one, norm = torch.zeros(rows, 4), torch.ones(()), torch.zeros(3, dtype=torch.int64)
    for kind, scale in (("none", None), ("layer_norm", f)):
        normed = None if scale is None else norm
        tap.read(hidden, residual, one, mine.W, mine.b, mine.theta, f, normed, scale)
        at = torch.zeros(2, dtype=torch.int64)
        acted = torch.zeros(rows, 4, dtype=torch.bool)
        tap.edit(hidden, f, acted, at, at, f[0, :2], W[:2].float(), scale)
        zero = torch.zeros(latents)
        encoder = encoder_in_memory(EncoderRows(W, zero, zero), k=8, norm=kind)  # type: ignore[arg-type]
        part = RankedRows(encoder, slice(0, 3), tuple(watched), torch.zeros(3))
        ranked = make_ranked(
            part,
            mine,
            torch.device("cpu"),
            allocate_buffers=lambda r, n: topk_buffers.allocate_buffers(r, n, max_tokens=rows),
        )
        topk.apply_topk(ranked, hidden, residual, one, f, scale)
        room = torch.zeros(64, dtype=torch.int32)
        encode_into(
            hidden, W, zero, zero, room, room, zero[:64], room[0],
            None if scale is None else f[:, 0].contiguous(),
        )  # fmt: skip


def compiled(kernel: JITFunction[Any], given: dict[str, Any], options: Any, target: int) -> Any:
    """Compile one launch."""
    fixed = {p.name for p in kernel.params if p.is_constexpr}
    kinds = {bool: "i1", int: "i32", float: "fp32"}
    signature = {
        name: "constexpr"
        if name in fixed
        else TYPES[value.dtype]
        if isinstance(value, torch.Tensor)
        else kinds[type(value)]
        for name, value in given.items()
    }
    constants = {(kernel.arg_names.index(name),): given[name] for name in fixed}
    source = ASTSource(kernel, signature, constants)
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def spilled(cubin: bytes, folder: Path) -> int:
    """Return how many bytes of each thread's registers go to memory."""
    (folder / "kernel.cubin").write_bytes(cubin)
    told = subprocess.run(
        [CUOBJDUMP, "--dump-resource-usage", folder / "kernel.cubin"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", told))


if __name__ == "__main__":
    wrong = []
    with TemporaryDirectory() as folder:
        found = launches()
        for i, (name, launch) in enumerate(found.items()):
            for target in (target for target, every in TARGETS.items() if i % every == 0):
                out = compiled(*launch, target)
                spills = spilled(out.asm["cubin"], Path(folder))
                if spills > SPILLS or out.metadata.shared > 48 * 1024:
                    wrong.append(f"sm_{target} {name}: {spills} bytes, {out.metadata.shared}")
    assert not wrong, "\n".join(wrong)
    print(f"{len(found)} launches for {len(TARGETS)} GPUs fit")
