"""Start a real server, and read what it says of itself."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
from prometheus_client.parser import text_string_to_metric_families

from tests import engine_starts, models
from tests.engine import engines

CHAT = [{"role": "user", "content": "hello there, how is it going?"}]


@dataclass(frozen=True)
class Server:
    """A running server."""

    process: subprocess.Popen[bytes]
    client: openai.OpenAI
    guarded: models.Guarded
    events: Path
    log: Path
    policies: int

    def chat(self, **more: Any) -> Any:
        """Ask once, greedily."""
        given = {"messages": CHAT, "max_tokens": 20, "temperature": 0, **more}
        return self.client.chat.completions.create(model="tiny", **given)

    def lines(self) -> list[dict[str, Any]]:
        """Return every line of the event log, whatever its kind."""
        lines = self.events.read_text().splitlines() if self.events.exists() else []
        return list(map(json.loads, lines))

    def told(self, request_id: str | None = None) -> list[dict[str, Any]]:
        """Return the verdicts, those of one request once its own line, the last, is written."""
        return [e for e in self._ended(request_id) if e["event"] == "verdict"]

    def request_lines(self, request_id: str | None = None) -> list[dict[str, Any]]:
        """Return the lines of requests, that of one request once it is written."""
        return [e for e in self._ended(request_id) if e["event"] == "request"]

    def _ended(self, request_id: str | None) -> list[dict[str, Any]]:
        for _ in range(200):
            found = self.lines()
            if request_id is None:
                return found
            found = [e for e in found if request_id in e.get("request_id", "")]
            if any(e["event"] == "request" for e in found):
                break
            time.sleep(0.1)
        return found

    def metrics(self, prefix: str = "saeguard_") -> dict[str, float]:
        """Return what `/metrics` says of the guard, or of what begins with `prefix`."""
        text = httpx.get(f"{self.client.base_url}".removesuffix("v1/") + "metrics").text
        return {
            sample.name + "".join(f",{k}={v}" for k, v in sorted(sample.labels.items())):
                sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name.startswith(prefix) and not sample.name.endswith("_created")
        }  # fmt: skip


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def environment() -> dict[str, str]:
    """Return the environment of a server, whose engine has a process of its own."""
    env = engines.environment()
    env.pop("VLLM_ENABLE_V1_MULTIPROCESSING")
    return env


def command(guarded: models.Guarded, port: int, *more: str) -> list[str]:
    """Return the command that serves a model under its policies."""
    return [
        sys.executable, "-m", "saeguard", "serve", str(guarded.model),
        "--policies", str(guarded.policies), "--feature-sets", str(guarded.feature_sets),
        "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port), *more,
    ]  # fmt: skip


@contextmanager
def started(
    command: Sequence[str], port: int, log: Path, *, cwd: Path | None = None, **env: str
) -> Iterator[tuple[subprocess.Popen[bytes], openai.OpenAI]]:
    """Run a server's command, wait until it answers, and kill what is left of it at the end."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**environment(), **env},
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    began = time.monotonic()
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    try:
        deadline = time.monotonic() + 400
        while True:
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            try:
                client.models.list()
                engine_starts.record("server ready", time.monotonic() - began)
                break
            except openai.APIConnectionError:
                time.sleep(0.5)
        yield process, client
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def serving(root: Path, guarded: models.Guarded, *more: str, **env: str) -> Iterator[Server]:
    """Start `saeguard serve` of a model under its policies."""
    port, events, log = free_port(), root / "events.jsonl", root / "server.log"
    more = ("--events", str(events), "--served-model-name", "tiny", *more)
    policies = len(engines.compile_policies(guarded.settings()).policies)
    with started(command(guarded, port, *more), port, log, **env) as (process, client):
        yield Server(process, client, guarded, events, log, policies)


def alive(group: int) -> list[str]:
    """Return the processes of a process group that run; one nobody has reaped does not."""
    found = [p for p in psutil.process_iter(["pid", "status"]) if p.pid != os.getpid()]
    return [
        " ".join(p.cmdline())
        for p in found
        if p.info["status"] != psutil.STATUS_ZOMBIE and _group(p.pid) == group
    ]


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None
