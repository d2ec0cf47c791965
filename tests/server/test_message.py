"""A policy that stops a request puts its message in place of the text, for any OpenAI client."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests import models
from tests.engine import engines

pytestmark = [pytest.mark.server, pytest.mark.engine]

MESSAGE = "This answer was withheld. Ask safety@example.com why."
CHAT: list[Any] = [{"role": "user", "content": "hello there, how is it going?"}]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """Serve a random model under a policy that stops with a message."""
    root = tmp_path_factory.mktemp("message")
    model = models.make_model("llama", root / "model")
    sae = models.make_sae(root / "sae")
    models.write_feature_set(root / "feature_sets" / "tiny.yaml", sae, latents=(4,))
    models.write_policy(
        root / "policies" / "stop.yaml",
        id="test.stop",
        action="stop",
        message=MESSAGE,
        scope="output",
        detect={"a": {"feature": "f4", "above": 0.1}},
        condition="a",
        **{"for": "2 of 3 tokens"},
    )
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = engines.environment()
    env.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    command = ["serve", str(model), "--policies", str(root / "policies"), "--enforce-eager"]
    command += ["--feature-sets", str(root / "feature_sets"), "--served-model-name", "tiny"]
    command += ["--dtype", "float32", "--max-model-len", "1024", "--port", str(port)]
    log = root / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "saeguard", *command, "--host", "127.0.0.1"],
            env=env,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    found = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    deadline = time.monotonic() + 400
    try:
        while True:
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            try:
                found.models.list()
                break
            except openai.APIConnectionError:
                time.sleep(0.5)
        yield found
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def ask(client: openai.OpenAI, **more: Any) -> Any:
    """Ask for a chat completion, the likeliest tokens."""
    return client.chat.completions.create(
        **{"model": "tiny", "messages": CHAT, "temperature": 0, "max_tokens": 60, **more}
    )


def test_a_chat_completion_is_the_message(client: openai.OpenAI) -> None:
    """Nothing of what was withheld is left beside it, and the reason names the policy."""
    body = ask(client, logprobs=True)
    [choice] = body.choices

    assert (choice.finish_reason, choice.stop_reason) == ("stop", "saeguard:test.stop")
    assert choice.message.content == MESSAGE
    assert choice.logprobs is None
    assert body.saeguard["message"] == MESSAGE
    assert body.saeguard["action"] == "stop"


def test_each_choice_has_its_own(client: openai.OpenAI) -> None:
    """Of several choices those that were stopped are replaced."""
    body = ask(client, n=2, temperature=1)

    for choice in body.choices:
        stopped = choice.stop_reason == "saeguard:test.stop"
        assert (choice.message.content == MESSAGE) == stopped


def test_a_stream_ends_with_the_message(client: openai.OpenAI) -> None:
    """What is out is out; the message is the last piece."""
    chunks = [c for c in ask(client, stream=True) if c.choices]

    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].choices[0].delta.content == MESSAGE
    assert MESSAGE not in "".join(c.choices[0].delta.content or "" for c in chunks[:-1])


def test_completions_too(client: openai.OpenAI) -> None:
    """Both routes, streaming and not."""
    asked: dict[str, Any] = {
        "model": "tiny", "prompt": "hello there", "temperature": 0, "max_tokens": 60
    }  # fmt: skip
    body = client.completions.create(**asked)
    *_, last = [c for c in client.completions.create(**asked, stream=True) if c.choices]

    assert body.choices[0].stop_reason == "saeguard:test.stop"
    assert body.choices[0].text == last.choices[0].text == MESSAGE
