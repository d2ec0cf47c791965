"""Start `saeguard serve` on the demo's model, and wait for it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from demo.leash import ROOT
from demo.progress import progress_bar

START_LIMIT = 600.0
"""Seconds that the server may take to start."""
NAME = "SmolLM2-135M-Instruct"
TAIL = 15
HERE = Path(__file__).resolve().parent
MODEL = ROOT / "models" / NAME
"""Where `saeguard demo-model` puts the model."""


class DemoError(RuntimeError):
    """The demonstration cannot go on; the message states why and what to do."""


@dataclass(frozen=True, slots=True)
class Places:
    """What the demonstration reads and where it writes."""

    model: Path
    policies: Path
    feature_sets: Path
    prompts: Path
    evaluation: Path
    out: Path

    @property
    def events(self) -> Path:
        """Return the event log."""
        return self.out / "events.jsonl"

    @property
    def log(self) -> Path:
        """Return the file of the server's output."""
        return self.out / "server.log"


def check(places: Places) -> None:
    """Look for what has to be there.

    Raises:
        DemoError: names the first thing that is missing, and what makes it.
    """
    needs = (
        (places.model / "config.json", "make it with `saeguard demo-model`"),
        (places.policies, "give --policies"),
        (places.feature_sets, "give --feature-sets"),
        (places.prompts, "give --prompts"),
        (saeguard(), "install the package: pip install -e '.[demo]'"),
    )
    for path, remedy in needs:
        if not path.exists():
            raise DemoError(f"{relative(path)} is missing; {remedy}")


def saeguard() -> Path:
    """Return the command beside the interpreter that runs this."""
    return Path(sys.executable).with_name("saeguard")


def serve_command(
    places: Places, port: int, *, enforce: Sequence[str], compiled: bool
) -> list[str]:
    """Return the command that serves the demo's model with the guard.

    Args:
        places: model, policies, feature sets, event log.
        port: to listen on.
        enforce: ids of shadow policies that a request may have enforced.
        compiled: let vLLM compile the model, which starts more slowly.
    """
    return [
        str(saeguard()), "serve", str(places.model),
        "--policies", str(places.policies),
        "--feature-sets", str(places.feature_sets),
        "--events", str(places.events),
        "--event-lines", "all",
        *(word for policy in enforce for word in ("--request-may-enforce", policy)),
        "--host", "127.0.0.1",
        "--port", str(port),
        "--served-model-name", NAME,
        "--dtype", "float32",
        "--max-model-len", "1024",
        "--max-num-seqs", "64",
        *([] if compiled else ["--enforce-eager"]),
    ]  # fmt: skip


def environment() -> dict[str, str]:
    """Return the server's environment: offline, and small on a CPU; the user's own values win."""
    return {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        **os.environ,
    }


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_ready(
    console: Console,
    server: subprocess.Popen[bytes],
    url: str,
    log: Path,
    limit: float = START_LIMIT,
) -> None:
    """Wait for the server to answer.

    Raises:
        DemoError: it ended or took too long; the end of its log is in the message.
    """
    started = time.monotonic()
    with progress_bar(console, count=False) as progress:
        task = progress.add_task("the server starts (about a minute)", total=None)
        while True:
            if server.poll() is not None:
                raise DemoError(
                    f"the server ended with status {server.returncode} while starting\n{_tail(log)}"
                )
            if time.monotonic() - started > limit:
                raise DemoError(f"the server did not start within {limit:.0f} s\n{_tail(log)}")
            if _answers(f"{url}/health"):
                progress.update(task, description="the server is ready", total=1, completed=1)
                return
            time.sleep(0.25)


def stop(server: subprocess.Popen[bytes]) -> None:
    """End the server now, so that its events are all written before they are read."""
    assert server.stdin is not None
    server.stdin.close()
    server.wait(60)


def relative(path: Path) -> str:
    """Return a path as it is shown."""
    full = path.resolve()
    return str(full.relative_to(ROOT)) if full.is_relative_to(ROOT) else str(path)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:  # noqa: S310
            return bool(response.status == 200)
    except OSError:
        return False


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
    return "\n".join([f"the end of {relative(log)}:", *(f"  {line}" for line in lines)])
