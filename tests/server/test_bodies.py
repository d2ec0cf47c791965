"""What is added to the bodies and events of routes, without a server."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from saeguard.vllm.api_server.bodies import Teller, body_with, event_with
from saeguard.vllm.api_server.told import Told
from saeguard.vllm.api_server.withheld import Stopped

FOUND: dict[str, Any] = {
    "flagged": True,
    "action": "flag",
    "verdicts": [{"policy": "a.b", "score": 1.5}],
    "coverage": {"tokens": 3, "evaluated": 2, "skipped": {"not_forwarded": 1}},
    "policies": 1,
    "errors": 0,
    "not_evaluated": 0,
    "watchlist": "0",
    "request_id": "r",
}


def told(*choices: int, stopped: bool = False) -> Told:
    """Return a record of some choices, stopped with a message of three tokens or not."""
    record = Told()
    for choice in choices:
        record.tell(choice, FOUND)
        if stopped:
            record.stops[choice] = Stopped("withheld", is_message=True, tokens=3)
            record.reasons[choice] = "saeguard:a.b"
    return record


def sent(record: Told, headers: list[tuple[bytes, bytes]], *parts: bytes) -> list[dict[str, Any]]:
    """Send a response in parts, and return what goes out."""
    out: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        out.append(message)

    async def run() -> None:
        teller = Teller(record, send)
        await teller({"type": "http.response.start", "status": 200, "headers": headers})
        for i, part in enumerate(parts):
            more = i < len(parts) - 1
            await teller({"type": "http.response.body", "body": part, "more_body": more})

    asyncio.run(run())
    return out


@pytest.mark.parametrize("body", [b"{}", b'{"a":1}', b' {"a": {"b": [1]}} \n'])
def test_an_object_gains_one(body: bytes) -> None:
    """Whatever else it holds stays."""
    found = json.loads(body_with(body, told(0)))
    assert found.pop("saeguard") == FOUND
    assert found == json.loads(body)


@pytest.mark.parametrize("body", [b"[1]", b"null", b"", b'{"cut": '])
def test_other_bodies_stay(body: bytes) -> None:
    """Also if a policy stopped the answer."""
    assert body_with(body, told(0)) == body
    assert body_with(body, told(0, stopped=True)) == body


def test_a_body_in_parts_has_its_new_length() -> None:
    """The start waits for the body, since its headers tell."""
    headers = [(b"content-type", b"application/json"), (b"content-length", b"7")]
    start, body = sent(told(0), headers, b'{"a"', b":1}")
    found = dict(start["headers"])
    assert int(found[b"content-length"]) == len(body["body"])
    assert (found[b"x-saeguard-flagged"], found[b"x-saeguard-policies"]) == (b"true", b"a.b")
    assert json.loads(body["body"])["saeguard"] == FOUND


def test_a_compressed_body_has_headers_only() -> None:
    """It is not read."""
    headers = [(b"content-type", b"application/json"), (b"content-encoding", b"gzip")]
    start, body = sent(told(0), headers, b"\x1f\x8b{}")
    assert (b"x-saeguard-policies", b"a.b") in start["headers"]
    assert body["body"] == b"\x1f\x8b{}"


def test_what_no_engine_answered_is_as_it_was() -> None:
    """No header, no copy."""
    headers = [(b"content-type", b"application/json")]
    start, body = sent(Told(), headers, b"{}")
    assert (start["headers"], body["body"]) == (headers, b"{}")


def test_cohere_has_no_word_for_it() -> None:
    """So a stopped answer ends as an error, and not as complete."""
    record = told(0, stopped=True)
    body = json.loads(body_with(b'{"finish_reason":"COMPLETE","message":{}}', record))
    assert (body["finish_reason"], body["saeguard"]) == ("ERROR", FOUND)
    data = b'{"type": "message-end", "delta": {"finish_reason": "COMPLETE"}}'
    event = b"event: message-end\ndata: %s\n\n" % data
    found = json.loads(event_with(event, record).partition(b"data: ")[2])
    assert found["delta"]["finish_reason"] == "ERROR"
    assert found["saeguard"] == FOUND


def test_each_choice_is_told_where_it_ends() -> None:
    """An event that ends no choice is untouched, as is text that only looks like an end."""
    record = told(0, 1)
    ends = b'data: {"choices":[{"index":1,"finish_reason":"stop"}]}\n\n'
    assert json.loads(event_with(ends, record)[6:])["saeguard"] == FOUND
    for event in (
        b'data: {"choices":[{"index":1,"delta":{"content":"x"}}]}\n\n',
        b"data: [DONE]\n\n",
        b": ping\n\n",
        b'data: {"choices":[{"index":1,"delta":{"content":"\\"finish_reason\\":\\"stop\\""}}]}\n\n',
    ):
        assert event_with(event, record) == event
    running = json.loads(
        event_with(b'data: {"choices":[{"index":1,"finish_reason":null}]}\n\n', record)[6:]
    )
    assert "saeguard" not in running


def test_usage_counts_what_is_withheld() -> None:
    """In OpenAI's names and in Anthropic's."""
    record = told(0, stopped=True)
    for names in (("completion_tokens", "total_tokens"), ("output_tokens",)):
        body = {"usage": {**dict.fromkeys(names, 5), "prompt_tokens": 2}, "choices": []}
        found = json.loads(body_with(json.dumps(body).encode(), record))
        assert found["usage"] == {**dict.fromkeys(names, 8), "prompt_tokens": 2}


def test_flags_ride_with_the_next_event() -> None:
    """Once; marks that are no JSON carry none."""
    record = Told()
    record.flag(0, FOUND, {"a.b"})
    events = [b"data: [DONE]\n\n", b'data: {"a":1}\n\n', b'data: {"a":2}\n\n']
    _, mark, first, second = sent(record, [(b"content-type", b"text/event-stream")], *events)
    assert (mark["body"], second["body"]) == (events[0], events[2])
    assert json.loads(first["body"][6:])["saeguard"] == {**FOUND, "choice": 0}
