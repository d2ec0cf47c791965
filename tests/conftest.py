"""What every test run does: keep lanes to one core each, and report what took long.

With `pytest -n 2` each worker is a lane: it keeps to one core, and so do the engines it starts, so
that neither slows the other down. Each lane has a compile cache of its own.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests import costs

LONGEST = (
    "tests/engine/test_storm.py",
    "tests/engine/test_reload.py",
    "tests/engine/test_parity.py",
    "tests/engine/test_fails_closed.py",
    "tests/engine/test_matrix.py",
)
"""Files that come first, so that no lane is left with a long one at the end."""
LONG = (
    "tests/engine/",
    "tests/server/",
    "tests/benchmarks/",
    "tests/test_benchmarks.py",
    "tests/test_make.py",
)
"""What comes next."""


def pytest_configure(config: pytest.Config) -> None:
    """Take a core if this process is a lane; prepare the report if it is not."""
    config.pluginmanager.register(costs.Meter())
    # A shell has what it starts in the background ignore Ctrl-C, and so would what the tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        _keep_to_one_core(int(worker.removeprefix("gw")))
    else:
        config.pluginmanager.register(costs.Summary())


def _keep_to_one_core(lane: int) -> None:
    """Pin this process and whatever it starts; what reads these variables is imported later."""
    cores = sorted(os.sched_getaffinity(0))
    core = cores[lane % len(cores)]
    os.sched_setaffinity(0, {core})
    cache = Path(os.environ.get("VLLM_CACHE_ROOT", "~/.cache/vllm")).expanduser() / f"lane{lane}"
    os.environ.update(
        {
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "VLLM_CACHE_ROOT": str(cache),
            "VLLM_CPU_OMP_THREADS_BIND": str(core),
        }
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long files first; within a file the order stays."""

    def rank(item: pytest.Item) -> tuple[int, int]:
        path = item.nodeid.partition("::")[0]
        if path in LONGEST:
            return 0, LONGEST.index(path)
        return 1, int(not path.startswith(LONG))

    items.sort(key=rank)
