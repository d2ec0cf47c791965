"""Child of `benchmarks/gpu.py`: the project's Triton kernels, piece by piece, without vLLM."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from benchmarks import gpu_op, gpu_ranks, gpu_tap, gpu_wide
from benchmarks.gpu_process import end_with_parent
from benchmarks.gpu_record import Piece, run_pieces
from benchmarks.gpu_timing import kernels_everywhere
from saeguard.guard.kernels import topk

PART = "kernels"


def pieces(*, tiny: bool) -> Mapping[str, Piece]:
    """Return all pieces by name; `benchmarks.gpu` knows the names without importing torch."""
    return {
        name: partial(piece, tiny=tiny)
        for name, piece in {
            "read, checks": gpu_tap.read_checks,
            "edit, checks": gpu_tap.edit_checks,
            "op, checks": gpu_op.checks,
            "ranks, checks": gpu_ranks.checks,
            "encode, checks": gpu_wide.checks,
            "whole encode, checks": gpu_wide.whole_checks,
            "read, times": gpu_tap.read_times,
            "edit, times": gpu_tap.edit_times,
            "op, times": gpu_op.op_times,
            "ranks, times": gpu_ranks.rank_times,
            "encode, times": gpu_wide.encode_times,
        }.items()
    }


def main() -> None:
    """Run the pieces that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pieces", required=True, help="names, a semicolon between two")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True, help="by time.monotonic()")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    end_with_parent()
    gc.freeze()  # a capture collects garbage first
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")  # references in tf32 would be none
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
        topk.PROGRAMS = 4  # of hundreds, nearly all idle; the interpreter runs each in turn
    every = pieces(tiny=args.tiny)
    wanted = {name: every[name] for name in args.pieces.split(";")}
    with torch.no_grad(), kernels_everywhere():
        run_pieces(PART, wanted, args.out, args.until)


if __name__ == "__main__":
    main()
