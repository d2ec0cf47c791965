"""Asynchronous scheduling, the default on GPUs: a step is scheduled before the last one is known.

vLLM switches it off on a CPU, where nothing runs beside Python. Here it stays on: its scheduler,
its batch queue and its model runner's delayed outputs are vLLM's own, only the CUDA streams and
events are stand-ins. What this cannot show is a copy that is still under way on a device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.engine import engines
from tests.engine.test_storm import SMALL_CACHE, Live, living, storm

pytestmark = pytest.mark.engine

STAND_INS = """
import contextlib
import torch

class Immediate:
    def __init__(self, *args, **kwargs):
        self.device = torch.device("cpu")

    def nothing(self, *args, **kwargs):
        pass

    record = synchronize = wait = wait_stream = wait_event = nothing

torch.Event = torch.cuda.Event = torch.cuda.Stream = Immediate
torch.cuda.current_stream = Immediate
torch.cuda.stream = lambda stream: contextlib.nullcontext()

from vllm.platforms.cpu import CpuPlatform
check = CpuPlatform.check_and_update_config.__func__

def keep_on(cls, vllm_config):
    check(cls, vllm_config)
    vllm_config.scheduler_config.async_scheduling = True

CpuPlatform.check_and_update_config = classmethod(keep_on)
"""

ALSO = """
import runpy, sys
for folder in sys.path:
    if folder.endswith("v2_runner_on_cpu"):
        runpy.run_path(f"{folder}/sitecustomize.py")
import saeguard_stand_ins
"""
"""Python runs the first `sitecustomize` only; V2 needs its own one, too."""


@contextmanager
def alive(root: Path, kind: type[Live], *, v2: bool = False) -> Iterator[Live]:
    """Run an engine whose steps overlap."""
    (root / "saeguard_stand_ins.py").write_text(STAND_INS)
    (root / "sitecustomize.py").write_text(ALSO)
    path = engines.environment(v2=v2)["PYTHONPATH"]
    engine = {**SMALL_CACHE, "async_scheduling": True}
    environment = {"PYTHONPATH": f"{root}:{path}"}
    with living(root, engine, kind, v2=v2, environment=environment) as live:
        yield live


class Stopping(Live):
    """An engine on which many prompts are stopped, with their next chunk under way already."""

    stops_above = (5.0, 4.5)


def test_what_a_stopped_request_computed_is_seen(tmp_path: Path) -> None:
    """Its later chunks are read from the cache by requests that begin alike."""
    with alive(tmp_path, Stopping) as live:
        storm(live, 80)
        assert live.tally.seen["stopped"] > 20
        assert live.tally.seen["cached"] > 2


@pytest.mark.parametrize(
    ("requests", "v2"),
    [
        (80, False),
        pytest.param(1000, False, marks=pytest.mark.slow),
        pytest.param(40, True, marks=pytest.mark.slow),
    ],
    ids=["some", "many", "v2"],
)
def test_storm(tmp_path: Path, requests: int, v2: bool) -> None:
    """Preemption, aborts, stop policies and cached prefixes while a step is always under way."""
    with alive(tmp_path, Live, v2=v2) as live:
        assert live.ask("mix", mix=[])["scheduler"] == "AsyncScheduler"
        storm(live, requests)
        rare = () if v2 else ("stopped",)  # it serves few requests
        for what in ("preempted", "aborted", "cached", *rare):
            assert live.tally.seen[what], what
