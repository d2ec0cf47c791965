"""What a reload replaces is let go: hundreds of lists leave nothing behind."""

from __future__ import annotations

import gc
import os
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from saeguard.vllm.settings import parse_settings
from tests import models
from tests.reload.test_reload import LATENTS, Server, children, write

RELOADS = 40
SLACK_MIB = 8
"""More than either process moves in so many reloads, and less than so many lists hold."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server with a list large enough for forty of it to show."""
    sae = models.make_sae(tmp_path / "sae")
    models.write_feature_set(tmp_path / "sets" / "tiny.yaml", sae, latents=LATENTS)
    (tmp_path / "policies").mkdir()
    for i in range(400):
        detect = {"a": {"feature": f"f{i % 12}", "above": 0.1 + i / 1000}}
        path = tmp_path / "policies" / f"p{i}.yaml"
        models.write_policy(path, id=f"test.p{i}", detect=detect, condition="a")
    write(tmp_path / "policies", 0)
    settings = {"policies": str(tmp_path / "policies"), "feature_sets": str(tmp_path / "sets")}
    server = Server(parse_settings(settings))
    deadline = time.monotonic() + 90
    while not server.reloader.status.outcomes and time.monotonic() < deadline:
        time.sleep(0.01)
    yield server
    server.reloader.close()


def resident_mib(pid: int) -> float:
    """Return what a process holds in memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def test_lists_are_let_go(server: Server, tmp_path: Path) -> None:
    """Each list but the present one dies as the next comes, in both processes."""
    (compiler,) = children(os.getpid())
    lists = [weakref.ref(server.lists.current)]
    held = {}
    for i in range(RELOADS):
        old = server.now
        write(tmp_path / "policies", i % 12, above=0.2 + i / 100)
        server.until(lambda r, old=old: r.outcome == "active" and r.old == old)  # type: ignore[misc]
        server.updates.take({})
        server.reports.clear()
        lists.append(weakref.ref(server.lists.current))
        if i == RELOADS // 4:
            held = {pid: resident_mib(pid) for pid in (os.getpid(), compiler)}
    gc.collect()
    assert [at for at, one in enumerate(lists) if one() is not None] == [RELOADS]
    assert children(os.getpid()) == [compiler]
    grown = {pid: resident_mib(pid) - before for pid, before in held.items()}
    assert max(grown.values()) < SLACK_MIB, grown
