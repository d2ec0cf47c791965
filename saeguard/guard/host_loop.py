"""The tap on a CPU as one compiled loop, for the few rows of a decode step.

Each call of a torch function costs about ten microseconds here once a forward pass has filled the
processor's caches, and the product of a few rows with a few encoder rows costs less than that. The
loop is compiled by numba. Where numba cannot compile, the tap runs as torch functions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import structlog
import torch

from saeguard.guard.compiled import by_address

log = structlog.get_logger("saeguard")

MOST = 2 * 2**20
"""Most multiplications of a pass that the loop computes; torch uses several threads for more."""
TOGETHER = 32
"""Rows that share a reading of the encoder rows; they fit the processor's second cache."""
FAST_MATH = {"reassoc", "contract", "nsz", "arcp"}
"""What the compiler may change: the order of sums. NaN and infinities keep their meaning."""


def read_few(
    hidden: Any, residual: Any, half: Any, W: Any, b: Any, floor: Any, x: Any, f: Any, shape: Any
) -> None:
    """Write the activations and norms of a few rows to `f`, as `saeguard.guard.tap.read` does.

    Args:
        hidden: [rows, d_in] float32; this and all others are addresses.
        residual: [rows, d_in] float32, added to `hidden` `half` times if there is one.
        half: [1] float32.
        W: [watched, d_in] float32.
        b: [watched] float32.
        floor: [watched] float32.
        x: [rows together, d_in] float32, overwritten.
        f: [rows, watched + 1] float32, the output.
        shape: [5] int64: rows, d_in, watched, rows together, and whether there is a residual.
    """
    rows, width, watched, together, added = shape[0], shape[1], shape[2], shape[3], shape[4]
    for first in range(0, rows, together):
        here = min(together, rows - first)
        for i in range(here):
            square = np.float32(0.0)
            row = (first + i) * width
            for k in range(width):
                value = hidden[row + k]
                if added:
                    value += half[0] * residual[row + k]
                x[i * width + k] = value
                square += value * value
            f[(first + i) * (watched + 1) + watched] = np.sqrt(square)
        for j in range(watched):
            for i in range(here):
                z = np.float32(0.0)
                for k in range(width):
                    z += x[i * width + k] * W[j * width + k]
                z += b[j]
                # A product rather than a choice, so that NaN stays NaN and counts as an error.
                f[(first + i) * (watched + 1) + j] = z * np.float32(z > floor[j])


@cache
def compiled() -> Callable[..., None] | None:
    """Return `read_few` compiled; None if numba cannot compile it on this machine."""
    try:
        return by_address(read_few, ["float32"] * 8 + ["int64"], FAST_MATH)
    except Exception as error:  # noqa: BLE001 - whatever is wrong with it, torch computes the same
        log.warning("saeguard reads taps without numba, more slowly", why=str(error))
        return None


class HostLoop:
    """The loop of one tap: `read_few` with its buffers.

    They stay in place, so their addresses are looked up once.
    """

    def __init__(
        self,
        function: Callable[..., None],
        W: torch.Tensor,
        b: torch.Tensor,
        floor: torch.Tensor,
        halves: torch.Tensor,
        f: torch.Tensor,
    ) -> None:
        """Take a tap's buffers; see `host_loop`."""
        watched, self.width = W.shape
        self.most = min(len(f), MOST // max(1, watched * self.width))
        """Most rows that it takes."""
        together = min(TOGETHER, max(1, self.most))
        x = torch.empty(together, self.width)
        self._buffers = (halves, W, b, floor, x, f)
        self._shape = np.array([0, self.width, watched, together, 0], np.int64)
        self._function = function
        self._addresses = [t.data_ptr() for t in self._buffers]
        self._at_shape = self._shape.ctypes.data

    def read(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> bool:
        """Write activations and norms to the tap's `f`, or return False: torch has to.

        Args:
            hidden: [rows, d_in].
            residual: the second value of the decoder layer; None without one.
        """
        rows = len(hidden)
        if rows > self.most or not self._fits(hidden, rows):
            return False
        if residual is not None and not self._fits(residual, rows):
            return False
        self._shape[0], self._shape[4] = rows, residual is not None
        at = hidden.data_ptr()
        other = at if residual is None else residual.data_ptr()
        self._function(at, other, *self._addresses, self._at_shape)
        return True

    def _fits(self, x: torch.Tensor, rows: int) -> bool:
        return x.dtype is torch.float32 and x.shape == (rows, self.width) and x.is_contiguous()


def host_loop(
    W: torch.Tensor, b: torch.Tensor, floor: torch.Tensor, halves: torch.Tensor, f: torch.Tensor
) -> HostLoop | None:
    """Return the loop of a tap on a CPU, None where torch has to do it.

    Args:
        W: [watched, d_in] float32 encoder rows.
        b: [watched] biases.
        floor: [watched] the activation from which the tap reports a latent.
        halves: [] how often the second value of the decoder layer is added.
        f: [max_tokens, watched + 1] the output.
    """
    tensors = (W, b, floor, halves, f)
    usable = all(t.is_cpu and t.dtype is torch.float32 and t.is_contiguous() for t in tensors)
    function = compiled() if usable and len(b) else None
    if function is None:
        return None
    loop = HostLoop(function, *tensors)
    return loop if loop.most and _agrees(loop, *tensors) else None


def _agrees(
    loop: HostLoop,
    W: torch.Tensor,
    b: torch.Tensor,
    floor: torch.Tensor,
    halves: torch.Tensor,
    f: torch.Tensor,
) -> bool:
    """Return whether the compiled loop and torch read the same from some rows."""
    generator = torch.Generator().manual_seed(0)
    n = min(3, loop.most)
    hidden, residual = torch.randn(2, n, W.shape[1], generator=generator)
    read = loop.read(hidden, residual)
    found = f[:n].clone()
    f[:n] = 0.0
    x = hidden + halves * residual
    z = torch.addmm(b, x, W.t())
    allowed = 1e-4 * z.abs().max().clamp(min=1e-6)
    sure = (z - floor).abs() > allowed
    gap = ((found[:, :-1] - z * (z > floor)).abs() * sure).max()
    off = (found[:, -1] - x.norm(dim=1)).abs().max() / x.norm(dim=1).max()
    if read and bool(gap <= allowed) and float(off) < 1e-4:  # noqa: PLR2004 - of float32 sums
        return True
    log.warning("saeguard reads taps without numba: its loop is wrong here", gap=float(gap))
    return False
