"""The demo fails early and says why."""

from __future__ import annotations

import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from rich.console import Console

from demo import run
from demo.leash import leashed

QUIET = Console(quiet=True)


def places(folder: Path) -> run.Places:
    """Places that are not there."""
    return run.Places(
        folder / "model", folder / "policies", folder / "sets", folder / "p.jsonl", folder / "out"
    )


def test_a_missing_model_is_told_with_its_remedy(tmp_path: Path) -> None:
    """Before a server is started for nothing."""
    with pytest.raises(run.DemoError, match=r"config\.json is not there; train it with"):
        run.check(places(tmp_path))


def test_a_server_that_dies_shows_the_end_of_its_log(tmp_path: Path) -> None:
    """At once, rather than after the time limit."""
    log = tmp_path / "server.log"
    code = "import sys; print('policy.yaml:3:1: error'); sys.exit(1)"
    with (
        log.open("wb") as file,
        leashed([sys.executable, "-c", code], file) as server,
        pytest.raises(run.DemoError, match=r"status 1(.|\n)*policy.yaml:3:1: error"),
    ):
        run.wait_until_ready(QUIET, server, "http://127.0.0.1:9", log)


def test_a_server_that_never_answers_is_given_up(tmp_path: Path) -> None:
    """After the limit."""
    log = tmp_path / "server.log"
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    with (
        log.open("wb") as file,
        leashed(sleep, file) as server,
        pytest.raises(run.DemoError, match="did not start within 0 s"),
    ):
        run.wait_until_ready(QUIET, server, f"http://127.0.0.1:{run.free_port()}", log, limit=0.3)


def test_a_failed_request_is_one_plain_error() -> None:
    """The server answers with an error, or without the guard's word."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(400)
            self.end_headers()
            self.wfile.write(b'{"error": {"message": "no such policy"}}')

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        prompt = {"id": "a", "behaviour": "benign", "messages": [{"role": "user", "content": "x"}]}
        with pytest.raises(run.DemoError, match="no such policy"):
            run.send(
                QUIET, "t", [prompt], url=f"http://127.0.0.1:{server.server_port}", max_tokens=1
            )
        server.shutdown()


def test_the_users_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Defaults for a small machine, not orders."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    assert run.environment()["VLLM_CPU_KVCACHE_SPACE"] == "4"
    assert run.environment()["HF_HUB_OFFLINE"] == "1"
