"""Triton kernels do what plain torch does; here in Triton's interpreter, without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def check(module: str, *, interpret: bool = True) -> str:
    """Run a child; the interpreter must be chosen before Triton is imported."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.kernels.{module}"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": str(int(interpret)), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


def test_the_tap_and_its_edit() -> None:
    """Activations in 96 cases and edits in 12 are those of the torch path."""
    assert check("check_tap").split() == ["read", "96", "edit", "12"]


def test_all_latents_with_compaction() -> None:
    """What fires is appended once and counted, also where the buffer is too small: 24 cases.

    Whole encodes by it, of TopK too, in 24 more.
    """
    assert check("check_wide").split() == ["wide", "24", "whole", "24"]


def test_ranks() -> None:
    """What TopK and groupmax keep is what float64 says, ties and near ties too: 12 cases."""
    assert check("check_rank").split() == ["rank", "12"]


def test_the_op_with_its_kernels() -> None:
    """Random requests in random passes, as `tests/guard/test_tap_clamp.py` has them; and ranks."""
    assert check("check_op").split() == ["op", "8"]


def test_they_compile_for_gpus_and_fit() -> None:
    """Triton and NVIDIA's assembler take every launch, and no product spills registers."""
    assert check("check_compiles", interpret=False).split()[-1] == "fit"
