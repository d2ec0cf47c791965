"""The demo fails early and says why."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from rich.console import Console

from demo import run, server
from demo.leash import leashed
from demo.server import DemoError, Places
from saeguard.policy.types import Clamp
from tests.demo import made

QUIET = Console(quiet=True)


def places(folder: Path) -> Places:
    """Places that are not there."""
    names = ("model", "policies", "sets", "p.jsonl", "evaluation.json", "out")
    return Places(*(folder / name for name in names))


def test_a_missing_model_is_told_with_its_remedy(tmp_path: Path) -> None:
    """Before a server is started for nothing."""
    with pytest.raises(
        DemoError, match=r"config\.json is missing; make it with `saeguard demo-model`"
    ):
        server.check(places(tmp_path))


def test_a_server_that_dies_shows_the_end_of_its_log(tmp_path: Path) -> None:
    """At once, rather than after the time limit."""
    log = tmp_path / "server.log"
    code = "import sys; print('policy.yaml:3:1: error'); sys.exit(1)"
    with (
        log.open("wb") as file,
        leashed([sys.executable, "-c", code], file) as started,
        pytest.raises(DemoError, match=r"status 1(.|\n)*policy.yaml:3:1: error"),
    ):
        server.wait_until_ready(QUIET, started, "http://127.0.0.1:9", log)


def test_a_server_that_never_answers_is_given_up(tmp_path: Path) -> None:
    """After the limit."""
    log = tmp_path / "server.log"
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    with (
        log.open("wb") as file,
        leashed(sleep, file) as started,
        pytest.raises(DemoError, match="did not start within 0 s"),
    ):
        server.wait_until_ready(
            QUIET, started, f"http://127.0.0.1:{server.free_port()}", log, limit=0.3
        )


def test_a_failed_request_is_one_plain_error() -> None:
    """The server answers with an error, or without the guard's word."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(400)
            self.end_headers()
            self.wfile.write(b'{"error": {"message": "no such policy"}}')

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        prompt = {"id": "a", "behaviour": "benign", "prompt": [{"role": "user", "content": "x"}]}
        with pytest.raises(DemoError, match="no such policy"):
            run.send(QUIET, "t", [prompt], url=f"http://127.0.0.1:{http.server_port}", max_tokens=1)
        http.shutdown()


def test_the_users_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Defaults for a small machine, not orders."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    assert server.environment()["VLLM_CPU_KVCACHE_SPACE"] == "4"
    assert server.environment()["HF_HUB_OFFLINE"] == "1"


def test_the_prompts_show_all_behaviours_and_ordinary_requests() -> None:
    """Forty of them, each with an id of its own."""
    prompts = run.read_prompts(server.HERE / "prompts.jsonl")
    kinds = Counter(p["behaviour"] for p in prompts)
    assert len({p["id"] for p in prompts}) == len(prompts) == 40
    assert set(kinds) == {
        "unsafe_code", "sycophancy", "deception", "jailbreak", "power_seeking", "refusal", "benign",
    }  # fmt: skip
    assert min(kinds.values()) >= 3


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", r"p.jsonl:1: expected one JSON object"),
        ('{"id": "a", "behaviour": "benign"}', r"p.jsonl:1: expected prompt \(list\)"),
        ("", "expected prompts, found none"),
    ],
)
def test_wrong_prompts_are_refused(content: str, expected: str, tmp_path: Path) -> None:
    """Before a server is started for nothing."""
    file = tmp_path / "p.jsonl"
    file.write_text(content)
    with pytest.raises(DemoError, match=expected):
        run.read_prompts(file)


def test_a_clamp_is_tried_on_the_prompts_that_invite_its_behaviour() -> None:
    """Ordinary ones if none does, so that a topic that is raised shows."""
    prompts = [{"id": "a", "behaviour": "unsafe_code"}, {"id": "b", "behaviour": "benign"}]
    assert run.prompts_for(made.policy(id="unsafe-code.clamp"), prompts) == prompts[:1]
    assert run.prompts_for(made.policy(id="steering.topic"), prompts) == prompts[1:]


def test_only_clamps_in_shadow_are_asked_for() -> None:
    """What is enforced already cannot be shown without."""
    clamp = Clamp(("shell",), 0.0)
    shadow = made.policy(id="a.b", mode="shadow", action="clamp", clamp=clamp)
    both = made.policy(id="c.d", mode="shadow", action="clamp", clamp=clamp)
    enforced = made.policy(id="c.d", mode="enforce", action="clamp", clamp=clamp)
    assert run.clamps_of([shadow, both, enforced, made.policy(mode="shadow")]) == [shadow]
