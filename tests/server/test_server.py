"""A real server behind the unmodified OpenAI client: what an application developer sees."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests import models
from tests.engine import engines

pytestmark = [pytest.mark.server, pytest.mark.engine]

CHAT = [{"role": "user", "content": "hello there, how is it going?"}]


@dataclass(frozen=True)
class Server:
    """A running server."""

    process: subprocess.Popen[bytes]
    client: openai.OpenAI
    model: str
    guarded: models.Guarded
    events: Path
    log: Path


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start `saeguard serve` on a random model, in vLLM's default mode."""
    root = tmp_path_factory.mktemp("server")
    guarded = models.make_guarded(root)
    models.write_policy(
        guarded.policies / "quiet.yaml",
        id="test.quiet",
        detect={"a": {"feature": "f0", "above": 90.0}},
        condition="a",
    )
    models.write_policy(
        guarded.policies / "hidden.yaml",
        id="test.hidden",
        mode="shadow",
        action="clamp",
        detect={"a": {"feature": "f4", "above": 0.1}},
        condition="a",
        clamp={"features": ["f4"], "to": -8.0},
    )
    port, events, log = free_port(), root / "events.jsonl", root / "server.log"
    env = engines.environment()
    env.pop("VLLM_ENABLE_V1_MULTIPROCESSING")
    command = ["serve", str(guarded.model), "--policies", str(guarded.policies)]
    command += ["--feature-sets", str(guarded.feature_sets), "--events", str(events)]
    command += ["--request-may-enforce", "test.hidden", "--served-model-name", "tiny"]
    command += ["--dtype", "float32", "--max-model-len", "512", "--port", str(port)]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "saeguard", *command, "--host", "127.0.0.1"],
            env=env,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    try:
        deadline = time.monotonic() + 400
        while True:
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                time.sleep(0.5)
        yield Server(process, client, "tiny", guarded, events, log)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


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


def events(server: Server, count: int) -> list[dict[str, Any]]:
    """Return the events once at least `count` have been written."""
    for _ in range(100):
        lines = server.events.read_text().splitlines() if server.events.exists() else []
        if len(lines) >= count:
            break
        time.sleep(0.1)
    return [json.loads(line) for line in lines]


def chat(server: Server, **more: Any) -> Any:
    """Ask once, greedily."""
    given = {"messages": CHAT, "max_tokens": 20, "temperature": 0, **more}
    return server.client.chat.completions.create(model=server.model, **given)


def test_a_response_says_what_fired(server: Server) -> None:
    """The body carries `saeguard` with policies, positions and coverage of this request."""
    response = chat(server)
    said = response.saeguard
    assert said["flagged"]
    assert said["action"] == "flag"
    tokens = response.usage.prompt_tokens + response.usage.completion_tokens
    assert said["coverage"]["tokens"] == tokens
    assert said["coverage"]["evaluated"] + sum(said["coverage"]["skipped"].values()) == tokens
    assert {v["policy"] for v in said["verdicts"]} >= {"test.p0"}
    assert all(v["score"] > 1 for v in said["verdicts"])
    assert "test.quiet" not in {v["policy"] for v in said["verdicts"]}


def test_shadow_and_log_stay_with_the_operator(server: Server) -> None:
    """A matching shadow policy is in the events and not in the response."""
    before = len(events(server, 0))
    response = chat(server)
    assert "test.hidden" not in {v["policy"] for v in response.saeguard["verdicts"]}
    new = [e for e in events(server, before + 8)[before:] if e["policy"] == "test.hidden"]
    assert [(e["verdict"], e["mode"], e["acted"]) for e in new] == [("match", "shadow", None)]


def test_streaming_says_the_same(server: Server) -> None:
    """The chunk that finishes carries what the unstreamed body does; all others are untouched."""
    whole = chat(server)
    chunks = list(chat(server, stream=True))
    said = [c.model_extra["saeguard"] for c in chunks if "saeguard" in (c.model_extra or {})]
    assert len(said) == 1
    assert chunks[-1].choices[0].finish_reason == "length"
    assert [v["policy"] for v in said[0]["verdicts"]] == [
        v["policy"] for v in whole.saeguard["verdicts"]
    ]
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert text == whole.choices[0].message.content


def test_each_choice_has_its_own_verdict(server: Server) -> None:
    """With `n=3` verdicts and coverage name their choice."""
    response = chat(server, n=3, temperature=1.0, seed=1)
    coverage = response.saeguard["coverage"]
    assert [c["choice"] for c in coverage] == [0, 1, 2]
    assert {v["choice"] for v in response.saeguard["verdicts"]} <= {0, 1, 2}


def test_completions_with_several_prompts(server: Server) -> None:
    """The older endpoint joins its prompts' verdicts, and streams them too."""
    client = server.client
    response = client.completions.create(
        model=server.model, prompt=["abc def", "xyz"], max_tokens=8, temperature=0
    )
    assert [c["choice"] for c in response.saeguard["coverage"]] == [0, 1]
    stream = client.completions.create(
        model=server.model, prompt="abc def", max_tokens=8, temperature=0, stream=True
    )
    said = [c.model_extra["saeguard"] for c in stream if "saeguard" in (c.model_extra or {})]
    assert len(said) == 1
    first = [v["policy"] for v in response.saeguard["verdicts"] if v["choice"] == 0]
    assert [v["policy"] for v in said[0]["verdicts"]] == first


def test_a_stop_string_keeps_the_verdict(server: Server) -> None:
    """A stop that only the API server sees still ends with a verdict."""
    whole = chat(server, max_tokens=40).choices[0].message.content
    stop = next(c for c in whole[3:] if c.isprintable() and c not in "\ufffd ")
    response = chat(server, max_tokens=40, stop=[stop])
    assert response.choices[0].finish_reason == "stop"
    assert response.saeguard["coverage"]["evaluated"] > 0


def test_a_request_can_be_stricter_but_not_choose_freely(server: Server) -> None:
    """An allowed shadow clamp changes the text; any other wish is a 400 that names the allowed."""
    free = chat(server)
    clamped = chat(server, extra_body={"vllm_xargs": {"saeguard_enforce": "test.hidden"}})
    assert clamped.saeguard["action"] == "clamp"
    assert clamped.choices[0].message.content != free.choices[0].message.content
    assert chat(server).choices[0].message.content == free.choices[0].message.content
    for xargs in ({"saeguard_enforce": "test.p0"}, {"saeguard_off": 1}):
        with pytest.raises(openai.BadRequestError, match=r"saeguard_enforce"):
            chat(server, extra_body={"vllm_xargs": xargs})


def test_an_aborted_stream_is_accounted_for(server: Server) -> None:
    """A client that walks away leaves events that say so."""
    for _ in range(6):  # the text may be whole before the server notices
        before = len(events(server, 0))
        stream = chat(server, stream=True, max_tokens=440)
        next(iter(stream))
        stream.close()
        new = [e for e in events(server, before + 8)[before:] if e["finished"] == "abort"]
        if new:
            break
    assert {e["policy"] for e in new} >= {"test.p0", "test.quiet"}
    for event in new:
        covered = event["coverage"]
        assert covered["tokens"] == covered["evaluated"] + sum(covered["skipped"].values())


def test_a_blind_server_ends(server: Server, tmp_path: Path) -> None:
    """Where the tap is not in the graph, the whole server ends, and its log says why."""
    (tmp_path / "sitecustomize.py").write_text(
        "import saeguard.vllm.worker as w\nw.hook_layer = lambda layers, index: None\n"
    )
    env = engines.environment()
    env.pop("VLLM_ENABLE_V1_MULTIPROCESSING")
    env["PYTHONPATH"] = f"{tmp_path}:{env['PYTHONPATH']}"
    command = ["serve", str(server.guarded.model), "--policies", str(server.guarded.policies)]
    command += ["--feature-sets", str(server.guarded.feature_sets), "--enforce-eager"]
    command += ["--dtype", "float32", "--max-model-len", "256", "--port", str(free_port())]
    done = subprocess.run(
        [sys.executable, "-m", "saeguard", *command, "--host", "127.0.0.1"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode != 0
    assert "saeguard self-test: the tap at layer 1 ran 0 times" in done.stdout + done.stderr


def test_many_at_once_then_a_clean_end(server: Server) -> None:
    """Forty concurrent requests, then SIGTERM: every request has its events, no process is left."""
    before = len(events(server, 0))

    def ask(i: int) -> Any:
        return chat(server, messages=[{"role": "user", "content": f"{i} " * (1 + i % 7)}])

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(40)))
    assert all(a.saeguard["policies"] == 8 for a in answers)
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(60)
    new = events(server, before + 40 * 8)[before:]
    assert len(new) == 40 * 8
    by_request: dict[str, int] = {}
    for event in new:
        by_request[event["request_id"]] = by_request.get(event["request_id"], 0) + 1
    assert set(by_request.values()) == {8}
    deadline = time.monotonic() + 20
    while (left := alive(server.process.pid)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left
