"""Every route of a real server withholds what a policy stopped, and tells so in its own format."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pydantic
import pytest

from tests import models
from tests.server.serving import Server, serving

pytestmark = [pytest.mark.server, pytest.mark.engine]

MESSAGE = "This answer was withheld. Ask safety@example.com why."
TEXT = "hello there, how is it going?"
CHAT = [{"role": "user", "content": TEXT}]
STOP = "saeguard:test.stop"
GREEDY = {"model": "tiny", "temperature": 0}
TOOL = {
    "type": "function",
    "function": {
        "name": "send",
        "parameters": {
            "type": "object",
            "properties": {"text": {"type": "string", "minLength": 80}},
            "required": ["text"],
        },
    },
}
LATENTS = tuple(range(0, 64, 4))
MATCH = {
    "action": "stop",
    "scope": "output",
    "detect": {f"s{n}": {"feature": f"f{n}", "above": 0.01} for n in LATENTS},
    "condition": " or ".join(f"s{n}" for n in LATENTS),
    "for": "6 of 10 tokens",
}
"""Holds for any text, after some tokens."""
TENANTS = ("stopped", "cut", "late", "prompt", "mute", "flag", "flow")
"""Tenants with one policy each: it stops with a message, stops without one, stops late, stops on
the prompt with and without a message, flags the prompt, flags the output. Others have none."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serve a random model; each tenant has its own policy."""
    root = tmp_path_factory.mktemp("routes")
    model = models.make_model("llama", root / "model")
    sae = models.make_sae(root / "sae")
    models.write_feature_set(root / "feature_sets" / "tiny.yaml", sae, latents=LATENTS)
    guarded = models.Guarded(model, sae, root / "policies", root / "feature_sets", LATENTS)
    for tenant, more in (
        ("stopped", {"id": "test.stop", "message": MESSAGE, **MATCH}),
        ("cut", {"id": "test.cut", **MATCH}),
        ("late", {**MATCH, "id": "test.late", "for": "50 of 64 tokens", "message": MESSAGE}),
        ("prompt", {**MATCH, "id": "test.prompt", "scope": "prompt", "message": MESSAGE}),
        ("mute", {**MATCH, "id": "test.mute", "scope": "prompt"}),
        ("flow", {**MATCH, "id": "test.flow", "action": "flag"}),
        ("flag", {**MATCH, "id": "test.flag", "scope": "prompt", "action": "flag"}),
    ):
        models.write_policy(guarded.policies / f"{tenant}.yaml", **more)
    keys = {name: hashlib.sha256(name.encode()).hexdigest() for name in TENANTS}
    (root / "access.yaml").write_text(
        "schema: saeguard.access/v1\ntenants:\n"
        + "".join(f"  {name}: {{keys_sha256: [{key}]}}\n" for name, key in keys.items())
        + "rules:\n"
        "  - {policies: [test.stop], tenants: [stopped], how: only}\n"
        "  - {policies: [test.cut], tenants: [cut], how: only}\n"
        "  - {policies: [test.late], tenants: [late], how: only}\n"
        "  - {policies: [test.prompt], tenants: [prompt], how: only}\n"
        "  - {policies: [test.mute], tenants: [mute], how: only}\n"
        "  - {policies: [test.flow], tenants: [flow], how: only}\n"
        "  - {policies: [test.flag], tenants: [flag], how: only}\n"
    )
    more_ = ["--access", str(root / "access.yaml"), "--enforce-eager", "--max-model-len", "1024"]
    more_ += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--enable-scale-out"]
    with serving(root, guarded, *more_, VLLM_ENABLE_RESPONSES_API_STORE="1") as running:
        yield running


def post(server: Server, route: str, tenant: str = "stopped", **body: Any) -> httpx.Response:
    """Send one request to a route below the server's root, greedily, as a tenant."""
    base = str(server.client.base_url).removesuffix("v1/")
    asked = {**GREEDY, **body}
    headers = {"authorization": f"Bearer {tenant}"}
    return httpx.post(base + route, json=asked, headers=headers, timeout=120)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """Return the data of a stream's events, the mark of its end left out."""
    lines = [ln.removeprefix("data: ") for ln in response.text.splitlines() if "data: " in ln[:6]]
    return [json.loads(line) for line in lines if line != "[DONE]"]


@pytest.fixture(scope="module")
def free(server: Server) -> str:
    """What the model answers to a tenant without policies."""
    body = post(server, "v1/chat/completions", "none", messages=CHAT, max_tokens=60).json()
    assert body["choices"][0]["finish_reason"] == "length"
    return str(body["choices"][0]["message"]["content"])


def told(body: dict[str, Any], response: httpx.Response | None = None) -> None:
    """Check the `saeguard` object of a stopped answer, and the headers of its response."""
    said = body["saeguard"]
    assert (said["flagged"], said["action"], said["message"]) == (True, "stop", MESSAGE)
    assert {"test.stop"} == {v["policy"] for v in said["verdicts"]}
    assert "stopped_by" not in said
    if response is not None:
        assert response.headers["x-saeguard-flagged"] == "true"
        assert response.headers["x-saeguard-policies"] == "test.stop"


def test_a_chat_completion_is_withheld(server: Server, free: str) -> None:
    """Text, ids and probabilities are gone; the usage still counts what was generated."""
    asked: dict[str, Any] = {"messages": CHAT, "max_tokens": 60, "logprobs": True}
    response = post(server, "v1/chat/completions", return_token_ids=True, **asked)
    body = response.json()
    [choice] = body["choices"]

    assert (choice["finish_reason"], choice["stop_reason"]) == ("content_filter", STOP)
    assert choice["message"]["content"] == MESSAGE
    assert [choice["logprobs"]["content"], choice["token_ids"]] == [[], []]
    assert free[:8] not in response.text
    told(body, response)
    covered = body["saeguard"]["coverage"]["tokens"]
    assert covered == body["usage"]["total_tokens"]
    assert 0 < body["usage"]["completion_tokens"] < 60


def test_a_quiet_answer_has_headers_too(server: Server) -> None:
    """So a gateway that sees none of them knows that nobody judged the answer."""
    body = post(server, "v1/chat/completions", "none", messages=CHAT, max_tokens=4)
    assert tuple(body.headers.get(f"x-saeguard-{name}") for name in ("flagged", "policies")) == (
        "unknown",
        None,
    )
    assert body.json()["saeguard"]["flagged"] is None  # no policy applies to this tenant
    models_ = httpx.get(f"{server.client.base_url}models")
    assert not [name for name in models_.headers if name.startswith("x-saeguard")]


def test_a_stop_string_hides_no_stop(server: Server, free: str) -> None:
    """A client's own stop string cannot be mistaken for a policy, nor take a policy's place."""
    body = post(server, "v1/completions", prompt=TEXT, max_tokens=60, stop=["\u2603"]).json()
    assert body["choices"][0]["stop_reason"] == STOP
    asked: dict[str, Any] = {"messages": CHAT, "max_tokens": 60, "stop": [free[1]]}
    [choice] = post(server, "v1/chat/completions", "none", **asked).json()["choices"]
    assert ("stop", free[1]) == (choice["finish_reason"], choice["stop_reason"])


def test_each_choice_on_its_own(server: Server) -> None:
    """Of several choices those that were stopped are withheld."""
    body = post(
        server, "v1/chat/completions", messages=CHAT, max_tokens=60, n=3, temperature=1.0, seed=1
    ).json()
    for choice in body["choices"]:
        stopped = choice["stop_reason"] == STOP
        assert (choice["message"]["content"] == MESSAGE) is stopped
        assert (choice["finish_reason"] == "content_filter") is stopped
    assert [c["choice"] for c in body["saeguard"]["coverage"]] == [0, 1, 2]


@pytest.mark.parametrize("route", ["v1/completions", "invocations"])
def test_completions_are_withheld(server: Server, route: str) -> None:
    """With several prompts, an echo, probabilities; what is echoed is the client's own."""
    asked: dict[str, Any] = {"prompt": [TEXT, "abc"], "max_tokens": 60, "echo": True, "logprobs": 2}
    response = post(server, route, **asked)
    body = response.json()
    assert [c["text"] for c in body["choices"]] == [TEXT + MESSAGE, "abc" + MESSAGE]
    assert {"content_filter"} == {c["finish_reason"] for c in body["choices"]}
    for choice, prompt in zip(body["choices"], [TEXT, "abc"], strict=True):
        assert len(choice["logprobs"]["tokens"]) <= len(prompt) + 1
    assert [c["choice"] for c in body["saeguard"]["coverage"]] == [0, 1]
    assert response.headers["x-saeguard-policies"] == "test.stop"


@pytest.mark.parametrize(
    ("route", "asked"),
    [("v1/chat/completions", {"messages": CHAT}), ("v1/completions", {"prompt": TEXT})],
)
def test_a_stream_ends_with_the_message(server: Server, route: str, asked: dict[str, Any]) -> None:
    """What is out is out; the message is a paragraph of its own, and the last chunk tells."""
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = events(post(server, route, max_tokens=60, **asked, **options))
    *before, last = [c for c in chunks if c["choices"]]
    texts = [c["choices"][0].get("text") or c["choices"][0].get("delta", {}).get("content") or ""
             for c in (*before, last)]  # fmt: skip

    assert tuple(last["choices"][0][name] for name in ("finish_reason", "stop_reason")) == (
        "content_filter",
        STOP,
    )
    assert texts[-1] == f"\n\n{MESSAGE}"
    assert MESSAGE not in "".join(texts[:-1])
    told(last)
    assert all("saeguard" not in c for c in before)
    assert last["saeguard"]["coverage"]["tokens"] == chunks[-1]["usage"]["total_tokens"]


def test_batched_chats_are_withheld(server: Server, free: str) -> None:
    """Each conversation of a batch."""
    response = post(server, "v1/chat/completions/batch", messages=[CHAT, CHAT], max_tokens=60)
    body = response.json()
    assert [c["message"]["content"] for c in body["choices"]] == [MESSAGE, MESSAGE]
    assert {("content_filter", STOP)} == {
        (c["finish_reason"], c["stop_reason"]) for c in body["choices"]
    }
    assert free[:8] not in response.text
    assert [c["choice"] for c in body["saeguard"]["coverage"]] == [0, 1]
    assert response.headers["x-saeguard-policies"] == "test.stop"


def incomplete(body: dict[str, Any]) -> None:
    """Check a body of the Responses API that a policy stopped."""
    assert (
        body["status"], body["incomplete_details"]
    ) == ("incomplete", {"reason": "content_filter"})  # fmt: skip
    told(body)
    assert body["usage"]["total_tokens"] == body["saeguard"]["coverage"]["tokens"]


def test_responses_are_withheld(server: Server, free: str) -> None:
    """Answered at once, or in the background and read by another request."""
    asked: dict[str, Any] = {"input": "hello there", "max_output_tokens": 60}
    response = post(server, "v1/responses", **asked)
    incomplete(response.json())
    assert [p["text"] for i in response.json()["output"] for p in i["content"]] == [MESSAGE]
    assert response.headers["x-saeguard-policies"] == "test.stop"

    later = post(server, "v1/responses", background=True, **asked).json()
    url = f"{server.client.base_url}responses/{later['id']}"
    for _ in range(200):
        body = httpx.get(url, headers={"authorization": "Bearer stopped"}).json()
        if body["status"] not in {"queued", "in_progress"}:
            break
    incomplete(body)
    assert [p["text"] for i in body["output"] for p in i["content"]] == [MESSAGE]
    assert free[:8] not in json.dumps(body)


def test_streamed_responses_end_incomplete(server: Server) -> None:
    """The last event is the one that OpenAI's clients know for it."""
    client = server.client.with_options(api_key="stopped")
    found = list(
        client.responses.create(
            model="tiny", input="hello there", max_output_tokens=60, temperature=0, stream=True
        )
    )
    assert found[-1].type == "response.incomplete"
    incomplete(found[-1].response.model_dump())
    text = "".join(e.delta for e in found if e.type == "response.output_text.delta")
    assert text.endswith(f"\n\n{MESSAGE}")
    assert text == found[-1].response.output_text


def test_messages_are_refused(server: Server) -> None:
    """Anthropic's format has a word for it, and no stop sequence that nobody set."""
    response = post(server, "v1/messages", messages=CHAT, max_tokens=60)
    body = response.json()
    assert (body["stop_reason"], body["stop_sequence"]) == ("refusal", None)
    assert body["content"] == [{"type": "text", "text": MESSAGE}]
    told(body, response)
    covered = body["saeguard"]["coverage"]["tokens"]
    assert covered == body["usage"]["input_tokens"] + body["usage"]["output_tokens"]

    found = events(post(server, "v1/messages", messages=CHAT, max_tokens=60, stream=True))
    [end] = [e for e in found if e["type"] == "message_delta"]
    assert (end["delta"]["stop_reason"], end["delta"]["stop_sequence"]) == ("refusal", None)
    told(end)
    text = "".join(e["delta"].get("text", "") for e in found if e["type"] == "content_block_delta")
    assert text.endswith(f"\n\n{MESSAGE}")


@pytest.mark.parametrize("mode", ["tokens", "text"])
def test_tokens_in_tokens_out_is_withheld(server: Server, mode: str) -> None:
    """No token id is left."""
    ids = post(server, "tokenize", prompt=TEXT).json()["tokens"]
    params = {"max_tokens": 60, "temperature": 0, "logprobs": 1}
    asked: dict[str, Any] = {"token_ids": ids, "sampling_params": params, "output_mode": mode}
    response = post(server, "inference/v1/generate", **asked)
    body = response.json()
    [choice] = body["choices"]
    assert (choice["finish_reason"], choice["token_ids"]) == ("content_filter", [])
    assert choice.get("text", MESSAGE) == MESSAGE
    told(body, response)
    found = events(post(server, "inference/v1/generate", **asked, stream=True))
    told(next(e for e in found if e.get("choices") and e["choices"][0].get("finish_reason")))


def test_a_stop_on_the_prompt(server: Server) -> None:
    """Nothing was generated; the message stands alone, streamed or not."""
    asked: dict[str, Any] = {"messages": CHAT, "max_tokens": 60}
    [choice] = post(server, "v1/chat/completions", "prompt", **asked).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (MESSAGE, "content_filter")
    chunks = events(post(server, "v1/chat/completions", "prompt", **asked, stream=True))
    text = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks)
    assert text == MESSAGE


@pytest.mark.parametrize(
    ("route", "asked"),
    [("v1/chat/completions", {"messages": CHAT}), ("v1/completions", {"prompt": TEXT})],
)
def test_a_stop_with_nothing_to_say(server: Server, route: str, asked: dict[str, Any]) -> None:
    """On the prompt and without a message: the stream ends with the reason all the same."""
    chunks = events(post(server, route, "mute", max_tokens=60, stream=True, **asked))
    last = chunks[-1]["choices"][0]
    assert (last["finish_reason"], last["stop_reason"]) == ("content_filter", "saeguard:test.mute")
    assert chunks[-1]["saeguard"]["action"] == "stop"


def test_generative_scores_are_withheld(server: Server) -> None:
    """They are read from one generated token; its probabilities are withheld with it."""
    response = post(
        server, "generative_scoring", "prompt", query=TEXT, items=["a", "b"], label_token_ids=[5, 6]
    )
    assert response.status_code == 400
    assert response.headers["x-saeguard-policies"] == "test.prompt"


class Answer(pydantic.BaseModel):
    """What a client wants to have."""

    text: str = pydantic.Field(min_length=60)


def test_typed_answers_fail_as_filtered(server: Server) -> None:
    """OpenAI's library raises its own error, before it parses what is no JSON."""
    with pytest.raises(openai.ContentFilterFinishReasonError):
        server.client.with_options(api_key="stopped").chat.completions.parse(
            model="tiny", messages=CHAT, max_tokens=90, temperature=0, response_format=Answer
        )


@pytest.mark.parametrize("tenant", ["stopped", "cut", "late"])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "send"}}])
def test_no_half_a_call(server: Server, tenant: str, choice: Any) -> None:
    """A stop inside a tool call leaves no call, and no end that asks to execute one."""
    asked: dict[str, Any] = {"messages": CHAT, "max_tokens": 120, "tools": [TOOL]}
    asked["tool_choice"] = choice
    body = post(server, "v1/chat/completions", tenant, **asked).json()["choices"][0]
    assert (body["finish_reason"], body["message"].get("tool_calls", [])) == ("content_filter", [])
    chunks = events(post(server, "v1/chat/completions", tenant, **asked, stream=True))
    *before, last = [c["choices"][0] for c in chunks if c["choices"]]
    assert last["finish_reason"] == "content_filter"
    assert not last["delta"].get("tool_calls")
    if tenant != "cut":
        assert last["delta"]["content"].strip() == MESSAGE
    calls = [t for c in before for t in c["delta"].get("tool_calls", ())]
    assert bool(calls) is (tenant == "late")  # what had been sent before the match
    assert {c.get("finish_reason") for c in before} == {None}


@pytest.mark.parametrize("tenant", ["stopped", "cut", "late"])
def test_no_half_a_call_in_responses(server: Server, tenant: str) -> None:
    """Streamed, a call that was cut is never told to be complete."""
    tool = {"type": "function", **TOOL["function"]}  # type: ignore[dict-item]
    asked: dict[str, Any] = {"input": TEXT, "max_output_tokens": 120, "tools": [tool]}
    asked["tool_choice"] = {"type": "function", "name": "send"}
    body = post(server, "v1/responses", tenant, **asked).json()
    calls = [item for item in body["output"] if item["type"] == "function_call"]
    assert (body["status"], calls) == ("incomplete", [])
    found = events(post(server, "v1/responses", tenant, **asked, stream=True))
    assert found[-1]["type"] == "response.incomplete"
    done = [e["item"] for e in found if e["type"] == "response.output_item.done"]
    for item in done:
        if item["type"] == "function_call" and item["status"] != "incomplete":
            json.loads(item["arguments"])  # one that was complete before the match
    kinds = [e["type"] for e in found]
    if tenant == "late":
        assert "response.function_call_arguments.delta" in kinds
        assert "response.function_call_arguments.done" not in kinds
        assert [i["status"] for i in done if i["type"] == "function_call"] == ["incomplete"]


def test_no_half_a_call_in_messages(server: Server) -> None:
    """Anthropic's clients execute on `tool_use`."""
    tool = {"name": "send", "input_schema": TOOL["function"]["parameters"]}  # type: ignore[index]
    asked: dict[str, Any] = {"messages": CHAT, "max_tokens": 90, "tools": [tool]}
    asked["tool_choice"] = {"type": "any"}
    for tenant in ("stopped", "cut"):
        body = post(server, "v1/messages", tenant, **asked).json()
        assert (
            body["stop_reason"], [b for b in body["content"] if b["type"] == "tool_use"]
        ) == ("refusal", [])  # fmt: skip


def test_text_of_a_stop_without_message(server: Server, free: str) -> None:
    """It ends at the token that fired; the end is told all the same."""
    response = post(server, "v1/chat/completions", "cut", messages=CHAT, max_tokens=60)
    [choice] = response.json()["choices"]
    assert (
        choice["finish_reason"], choice["stop_reason"]
    ) == ("content_filter", "saeguard:test.cut")  # fmt: skip
    assert 0 < len(choice["message"]["content"]) < len(free)
    assert free.startswith(choice["message"]["content"])
    assert response.headers["x-saeguard-policies"] == "test.cut"


@pytest.mark.parametrize(
    ("route", "asked"),
    [
        ("v1/chat/completions", {"messages": CHAT}),
        ("v1/chat/completions", {"messages": CHAT, "stream": True}),
        ("v1/completions", {"prompt": TEXT}),
    ],
)
def test_beams_cannot_evade(server: Server, route: str, asked: dict[str, Any]) -> None:
    """Refused while a policy is enforced that cannot see them; else told as one answer."""
    beams = {"use_beam_search": True, "n": 2, "max_tokens": 8}
    for tenant, policy in (("stopped", "test.stop"), ("prompt", "test.prompt")):
        response = post(server, route, tenant, **asked, **beams)
        assert response.status_code == 400
        assert policy in response.json()["error"]["message"]
    if "stream" in asked:
        return
    for tenant, flagged in (("flag", True), ("none", None)):
        response = post(server, route, tenant, **asked, **beams)
        assert response.status_code == 200
        said = response.json()["saeguard"]
        assert said["flagged"] is flagged
        assert [v["policy"] for v in said["verdicts"]] == ["test.flag"] * bool(flagged)
        assert len(response.json()["choices"]) == 2


@pytest.mark.parametrize(
    ("route", "asked"),
    [("v1/chat/completions", {"messages": CHAT}), ("v1/completions", {"prompt": TEXT})],
)
def test_a_flag_rides_with_its_token(server: Server, route: str, asked: dict[str, Any]) -> None:
    """A stream that asks is told in the chunk after the token that fired, and again at its end."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    more = {"stream": True, "max_tokens": 30, "stream_options": options}
    asked = {**asked, **more, "vllm_xargs": {"saeguard_stream_flags": 1}}
    chunks = [c for c in events(post(server, route, "flow", **asked)) if c["choices"]]
    [early, last] = [i for i, c in enumerate(chunks) if "saeguard" in c]
    assert last == len(chunks) - 1
    [verdict] = chunks[early]["saeguard"]["verdicts"]
    assert (verdict["policy"], chunks[early]["saeguard"]["flagged"]) == ("test.flow", True)
    assert not {"fresh", "stopped_by"} & set(chunks[early]["saeguard"])
    fired = verdict["first_token"] - chunks[early]["usage"]["prompt_tokens"] + 1
    before, sent = (c["usage"]["completion_tokens"] for c in chunks[early - 1 : early + 1])
    assert before <= fired <= sent  # its residual exists when the next token is sampled
    assert chunks[last]["saeguard"]["verdicts"][0]["first_token"] == verdict["first_token"]


def test_a_stream_may_ask_for_no_less(server: Server) -> None:
    """What a switch may be is told; every other value is refused."""
    for value in (0, "off"):
        response = post(
            server,
            "v1/chat/completions",
            messages=CHAT,
            vllm_xargs={"saeguard_stream_flags": value},
        )
        assert response.status_code == 400
        assert "saeguard_stream_flags: expected 1" in response.json()["error"]["message"]


def test_tool_calls_can_be_held_back(server: Server) -> None:
    """Asked to, a stream sends calls only once the answer is judged: whole, or none of them."""
    asked: dict[str, Any] = {"messages": CHAT, "max_tokens": 300, "tools": [TOOL], "stream": True}
    asked |= {"tool_choice": "required", "vllm_xargs": {"saeguard_hold_tool_calls": 1}}
    for tenant in ("late", "none"):
        chunks = events(post(server, "v1/chat/completions", tenant, **asked))
        choices = [c["choices"][0] for c in chunks if c["choices"]]
        calling = [i for i, c in enumerate(choices) if c["delta"].get("tool_calls")]
        assert calling == ([len(choices) - 1] if tenant == "none" else [])
    names = [call["function"]["name"] for call in choices[-1]["delta"]["tool_calls"]]
    assert set(names) == {"send"}
    assert choices[-1]["finish_reason"] in {"tool_calls", "length"}
