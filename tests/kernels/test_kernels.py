"""Triton kernels do what plain torch does; here in Triton's interpreter, without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def check(module: str) -> str:
    """Run a child in the interpreter, which must be chosen before Triton is imported."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.kernels.{module}"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
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
    """What fires is appended once and counted, also where the buffer is too small: 24 cases."""
    assert check("check_wide").split() == ["wide", "24"]
