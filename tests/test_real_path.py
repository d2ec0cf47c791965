"""Links are resolved as the kernel does, and links into another process are left alone."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from saeguard.real_path import real_path
from saeguard.reload.policy_source import Source, load
from tests import models

SOURCE = Path(__file__).parents[1] / "saeguard"


def test_as_path_resolve(tmp_path: Path) -> None:
    """Without links of /proc, it is `Path.resolve`."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to("a/b")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    for path in ("link", "link/..", "a/up/link/./x", "nowhere/../link", "a//b/"):
        assert real_path(tmp_path / path) == (tmp_path / path).resolve()
        assert real_path(f"{tmp_path}/{path}") == Path(f"{tmp_path}/{path}").resolve()
    assert real_path(".") == Path.cwd().resolve()


def test_links_in_a_circle(tmp_path: Path) -> None:
    """They end."""
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="in a circle"):
        real_path(tmp_path / "a" / "x")


@pytest.mark.parametrize("link", ["root", "cwd"])
def test_a_link_into_a_process_stays(link: str, tmp_path: Path) -> None:
    """What it reads as holds in that process only."""
    here = f"/proc/{os.getpid()}/{link}"
    assert real_path(f"/proc/self/{link}/models") == Path(f"{here}/models")
    assert real_path(f"{here}/models/../../x") == Path(f"{here}/x")
    (tmp_path / "models").symlink_to(f"{here}/models")
    assert real_path(tmp_path / "models" / "x.yaml") == Path(f"{here}/models/x.yaml")


def test_no_module_resolves_links_itself() -> None:
    """All go through `real_path`, or do not need it."""
    found = [
        f"{file.relative_to(SOURCE)}:{number}"
        for file in SOURCE.rglob("*.py")
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if ".resolve()" in line or "realpath(" in line
    ]
    assert found == []


CHROOT = "import os, sys; os.chroot(sys.argv[1]); print(flush=True); sys.stdin.read()"


@pytest.fixture
def other_root(tmp_path: Path) -> Iterator[Path]:
    """The root of a process that has another one, as this process sees it."""
    root = tmp_path / "image"
    (root / "models").mkdir(parents=True)
    models.write_feature_set(
        root / "models" / "sets" / "tiny.yaml", models.make_sae(root / "models" / "sae"),
        latents=(0, 1),
    )  # fmt: skip
    models.write_policy(
        root / "models" / "policies" / "one.yaml",
        detect={"a": {"feature": "f0", "above": 0.5}}, condition="a",
    )  # fmt: skip
    child = subprocess.Popen(
        [sys.executable, "-c", CHROOT, str(root)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=_as_root if os.geteuid() else None,  # noqa: PLW1509 - one thread
    )  # fmt: skip
    assert child.stdout is not None
    if not child.stdout.readline():
        pytest.skip("this system does not let a process have another root")
    yield Path(f"/proc/{child.pid}/root")
    child.kill()
    child.wait()


def _as_root() -> None:
    """Enter a user namespace of our own, in which a process may change its root."""
    ctypes.CDLL(None).unshare(0x10000000)


def test_a_model_car(other_root: Path, tmp_path: Path) -> None:
    """Policies, sets and SAE are read from the image of another container, as KServe links it."""
    (tmp_path / "mnt").symlink_to(other_root / "models")
    loaded = load(Source(tmp_path / "mnt" / "policies", tmp_path / "mnt" / "sets"))
    assert [policy.id for policy in loaded.watchlist.policies]
