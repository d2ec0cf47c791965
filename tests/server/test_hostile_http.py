"""Hostile HTTP: a policy that always stops withholds every answer, and accounts for each request.

`SAEGUARD_HOSTILE=10000` (`make hostile`) sends so many requests; CI sends a few hundred.
"""

from __future__ import annotations

import asyncio
import collections
import json
import os
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import models
from tests.server.hostile_requests import Ask, ask
from tests.server.serving import Server, serving
from tests.tiny import tokenizer

pytestmark = [pytest.mark.server, pytest.mark.engine]

REQUESTS = int(os.environ.get("SAEGUARD_HOSTILE", "400"))
AT_ONCE = 24
FIRST = 259
"""The first token id that the model emits; the tokenizer's bytes and special tokens lie below."""
EMITTED = re.compile(r"Zq\d{3}Z")
"""A word that the model emits; a request holds some only where it asks for a format."""
MESSAGE = "This answer was withheld."
NAMED = ("/v1/chat/completions", "/v1/completions")
"""Routes that name a request by the header `x-request-id`."""


@dataclass(frozen=True)
class Answer:
    """What came back."""

    ask: Ask
    status: int
    """0 if the client left or the connection broke."""
    text: str


def make_model(path: Path) -> None:
    """Save a random Llama that emits words of its own only, by one dimension that never varies."""
    models.make_model("llama", path)
    weights = load_file(path / "model.safetensors")
    weights["model.embed_tokens.weight"][:, 0] = 3.0
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[0] = 0
    weights["lm_head.weight"][:, 0] = torch.where(torch.arange(models.VOCABULARY) < FIRST, -300, 0)
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    words = tokenizer()
    words.add_tokens([f"Zq{i:03}Z" for i in range(models.VOCABULARY - FIRST)])
    words.save_pretrained(path)


def make_sae(path: Path) -> Path:
    """Save an SAE whose latent 4 fires on every token."""
    models.make_sae(path)
    [file] = path.glob("*.safetensors")
    weights = load_file(file)
    weights["b_enc"][4] = 100.0
    save_file(weights, file)
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serve the model under a policy that stops at the first token of every output."""
    root = tmp_path_factory.mktemp("hostile")
    make_model(root / "model")
    sae = make_sae(root / "sae")
    models.write_feature_set(root / "feature_sets" / "tiny.yaml", sae, latents=(0, 4))
    always = {"detect": {"a": {"feature": "f4", "above": 0.1}}, "condition": "a"}
    models.write_policy(
        root / "policies" / "stop.yaml",
        id="test.stop", action="stop", message=MESSAGE, scope="output", **always,
    )  # fmt: skip
    models.write_policy(
        root / "policies" / "quiet.yaml",
        id="test.quiet", detect={"a": {"feature": "f0", "above": 90.0}}, condition="a",
    )  # fmt: skip
    guarded = models.Guarded(root / "model", sae, root / "policies", root / "feature_sets", (0, 4))
    tools = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    with serving(root, guarded, "--enforce-eager", "--max-model-len", "512", *tools) as running:
        yield running


@pytest.fixture(scope="module")
def answers(server: Server) -> list[Answer]:
    """Send every request, `AT_ONCE` at a time; return what came back."""
    rng = random.Random(20261129)  # noqa: S311 - tests repeat
    asked = [ask(rng, n) for n in range(REQUESTS)]
    return asyncio.run(_send(str(server.client.base_url).removesuffix("v1/"), asked))


async def _send(base: str, asked: list[Ask]) -> list[Answer]:
    gate = asyncio.Semaphore(AT_ONCE)
    limits = httpx.Limits(max_connections=AT_ONCE)
    async with httpx.AsyncClient(base_url=base, timeout=120, limits=limits) as client:

        async def one(given: Ask) -> Answer:
            async with gate:
                return await _fire(client, given)

        return await asyncio.gather(*map(one, asked))


async def _fire(client: httpx.AsyncClient, given: Ask) -> Answer:
    read = b""
    try:
        async with client.stream(
            given.method, given.path.lstrip("/"), content=given.body, headers=given.headers
        ) as response:
            async for piece in response.aiter_bytes():
                read += piece
                if given.leaves is not None and len(read) >= given.leaves:
                    return Answer(given, 0, read.decode(errors="replace"))
            return Answer(given, response.status_code, read.decode(errors="replace"))
    except httpx.TransportError:
        return Answer(given, 0, read.decode(errors="replace"))


def test_the_model_emits_its_own_words(server: Server) -> None:
    """One token is out before any is read, so an answer of one token shows a word."""
    body = server.chat(max_tokens=1)

    assert EMITTED.fullmatch(body.choices[0].message.content)


def test_every_kind_of_answer_came(answers: list[Answer]) -> None:
    """Each generating route that this vLLM serves answered, streamed and whole."""
    served = {a.ask.path for a in answers if a.status != 404}
    good = collections.Counter((a.ask.path, a.ask.stream) for a in answers if a.status == 200)
    print(sorted(collections.Counter((a.ask.path, a.status) for a in answers).items()))

    for route in served & {*NAMED, "/v1/messages"}:
        assert good[route, True] > 0, route
        assert good[route, False] > 0, route


def test_no_answer_holds_text_behind_the_match(answers: list[Answer]) -> None:
    """The match is at the first token: a stream holds no second one, a stopped body not even it."""
    for answer in answers:
        stopped = "saeguard:test.stop" in answer.text and not answer.ask.stream
        most = 0 if stopped and answer.ask.choices == 1 else answer.ask.choices

        for piece in _pieces(answer):
            words = EMITTED.findall(_without_probabilities(piece))
            if answer.status >= 400:  # an error may repeat what was asked
                words = [w for w in words if w.encode() not in answer.ask.body]
            assert len(words) <= most, (answer.ask.path, answer.ask.body, answer.text)


def test_no_stopped_body_holds_token_ids(answers: list[Answer]) -> None:
    """Token ids and probabilities are text, too."""
    for answer in answers:
        if answer.status != 200 or answer.ask.stream or answer.ask.path != "/v1/chat/completions":
            continue
        for choice in json.loads(answer.text)["choices"]:
            if choice.get("stop_reason") == "saeguard:test.stop":
                assert choice["finish_reason"] == "content_filter", answer
                assert not choice.get("token_ids"), answer
                assert not (choice.get("logprobs") or {}).get("content"), answer
                assert choice["message"]["content"].endswith(MESSAGE), answer  # behind an echo
                assert not choice["message"].get("tool_calls"), answer


def test_every_request_has_one_account(server: Server, answers: list[Answer]) -> None:
    """Whatever became of a request, it has one line, both policies and all of its tokens in it."""
    _wait_until_idle(server)
    accounts = collections.Counter[str]()
    for line in server.request_lines():
        accounts[line["request_id"]] += 1
        coverage = line["coverage"]
        assert coverage["tokens"] == coverage["evaluated"] + sum(coverage["skipped"].values()), line
        assert sum(line["verdicts"].values()) == line["policies"] == 2, line

    assert set(accounts.values()) == {1}
    for answer in answers:
        if answer.status == 200 and answer.ask.path in NAMED and "error" not in answer.text:
            name = answer.ask.headers["x-request-id"]
            own = [i for i in accounts if name in i]
            assert len(own) == answer.ask.choices or "beam" in str(answer.ask.body), answer


def test_no_fault_is_ours(server: Server, answers: list[Answer]) -> None:
    """The server lives, and no answer is an internal error of the guard."""
    assert answers
    assert server.process.poll() is None
    assert server.chat().choices[0].stop_reason == "saeguard:test.stop"
    internal = [a for a in answers if a.status >= 500]
    print(collections.Counter((a.ask.path, _complaint(a)) for a in internal))
    assert not [a for a in internal if "saeguard" in _complaint(a)]
    tracebacks = re.split(r"(?=Traceback \(most recent call last\))", server.log.read_text())[1:]
    ours = [t[:4000] for t in tracebacks if "saeguard/" in t[:4000].split("Error: ")[0][-400:]]
    assert not ours, ours[0]


def _complaint(answer: Answer) -> str:
    """Return an error's message, without what was found in the answer."""
    try:
        return str(json.loads(answer.text)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return answer.text


def _pieces(answer: Answer) -> list[str]:
    """Return the text of a stream's pieces as one, and apart those events that repeat the text."""
    if not answer.ask.stream:
        return [answer.text]
    events = [line for line in answer.text.splitlines() if line.startswith("data: ")]
    repeats = [
        e
        for e in events
        if re.search(r'"type":\s*"response\.[a-z_.]*(done|completed|incomplete)"', e)
    ]
    return ["\n".join(e for e in events if e not in repeats), *repeats]


def _without_probabilities(text: str) -> str:
    """Return an answer without `logprobs`, which name tokens that were not chosen."""
    return re.sub(r'"(prompt_)?logprobs":\s*(\{.*?\}\]\}|\[.*?\])', "", text)


def _wait_until_idle(server: Server) -> None:
    for _ in range(300):
        running: dict[str, Any] = server.metrics("vllm:num_requests_")
        if sum(running.values()) == 0:
            time.sleep(1)
            return
        time.sleep(0.2)
    raise AssertionError(running)
