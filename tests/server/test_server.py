"""A real server behind the unmodified OpenAI client: what an application developer sees."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tests import models
from tests.cli.project import plain
from tests.server.serving import Server, alive, command, environment, free_port, serving

pytestmark = [pytest.mark.server, pytest.mark.engine]


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
    models.write_policy(
        guarded.policies / "stop.yaml",
        id="test.stop",
        mode="shadow",
        action="stop",
        scope="output",
        detect={"a": {"feature": "f4", "above": 0.1}},
        condition="a",
        **{"for": "2 of 3 tokens"},
    )
    models.write_policy(
        guarded.policies / "long.yaml",
        id="test.long",
        mode="shadow",
        scope="output",
        detect={"a": {"feature": "f4", "above": 0.1}},
        condition="a",
        **{"for": "3 of 64 tokens"},
    )
    allowed = ("--request-may-enforce", "test.hidden", "--request-may-enforce", "test.stop")
    with serving(root, guarded, *allowed, "--max-model-len", "4096") as running:
        yield running


def test_a_response_says_what_fired(server: Server) -> None:
    """The body carries `saeguard` with policies, positions and coverage of this request."""
    response = server.chat()
    said = response.saeguard
    assert said["flagged"]
    assert said["action"] == "flag"
    tokens = response.usage.prompt_tokens + response.usage.completion_tokens
    assert said["coverage"]["tokens"] == tokens
    assert said["coverage"]["evaluated"] + sum(said["coverage"]["skipped"].values()) == tokens
    assert {v["policy"] for v in said["verdicts"]} >= {"test.p0"}
    assert all(v["score"] > 1 for v in said["verdicts"])
    assert "test.quiet" not in {v["policy"] for v in said["verdicts"]}


def test_a_response_says_what_was_not_judged(server: Server) -> None:
    """With one token, which nothing reads, policies of the output are no clean verdicts."""
    said = server.chat(max_tokens=1).saeguard
    [line] = server.request_lines(said["request_id"])
    assert said["not_evaluated"] == line["verdicts"]["not_evaluated"] > 0
    assert said["flagged"] is not None  # others look at the prompt

    skipped = said["coverage"]["skipped"]
    assert skipped["not_forwarded"] == 1
    both = server.chat(n=2, max_tokens=1, temperature=1.0).saeguard
    assert both["not_evaluated"] == 2 * said["not_evaluated"]
    assert all(server.request_lines(id_) for id_ in both["request_id"])


def test_an_answer_in_pieces_is_judged_whole(server: Server) -> None:
    """What a request has continued is output: its tokens count as if the model had just written."""
    asked = [{"role": "user", "content": "hello"}]
    begun = [*asked, {"role": "assistant", "content": "so far so good, and so on and on"}]
    going_on = {"continue_final_message": True, "add_generation_prompt": False}
    for messages, how, matches in ((asked, {}, False), (begun, going_on, True), (begun, {}, False)):
        answer = server.chat(max_tokens=2, messages=messages, extra_body=how)
        found = {e["policy"] for e in server.told(answer.saeguard["request_id"])}
        assert ("test.long" in found) == matches, how


def test_a_start_ends_in_a_box(server: Server) -> None:
    """It says what is watched, what it costs, and where events go."""
    log = server.log.read_text()
    [said] = log.split("saeguard is ready")[1:]
    box = plain(said[: said.index("\u256f")])
    assert f"{server.policies} policies (" in box
    assert "at layer 1" in box
    assert "microseconds for a pass of" in box
    assert str(server.events) in box.replace(" ", "")
    assert f"{server.client.base_url}".removesuffix("/v1/") in box


def test_shadow_and_log_stay_with_the_operator(server: Server) -> None:
    """A matching shadow policy is in the events and not in the response."""
    response = server.chat()
    assert "test.hidden" not in {v["policy"] for v in response.saeguard["verdicts"]}
    new = [e for e in server.told(response.id) if e["policy"] == "test.hidden"]
    assert [(e["verdict"], e["mode"], e["acted"]) for e in new] == [("match", "shadow", None)]


def test_streaming_says_the_same(server: Server) -> None:
    """The chunk that finishes carries what the unstreamed body does; all others are untouched."""
    whole = server.chat()
    chunks = list(server.chat(stream=True))
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
    response = server.chat(n=3, temperature=1.0, seed=1)
    coverage = response.saeguard["coverage"]
    assert [c["choice"] for c in coverage] == [0, 1, 2]
    assert {v["choice"] for v in response.saeguard["verdicts"]} <= {0, 1, 2}


def test_completions_with_several_prompts(server: Server) -> None:
    """The older endpoint joins its prompts' verdicts, and streams them too."""
    client = server.client
    response = client.completions.create(
        model="tiny", prompt=["abc def", "xyz"], max_tokens=8, temperature=0
    )
    assert [c["choice"] for c in response.saeguard["coverage"]] == [0, 1]
    stream = client.completions.create(
        model="tiny", prompt="abc def", max_tokens=8, temperature=0, stream=True
    )
    said = [c.model_extra["saeguard"] for c in stream if "saeguard" in (c.model_extra or {})]
    assert len(said) == 1
    first = [v["policy"] for v in response.saeguard["verdicts"] if v["choice"] == 0]
    assert [v["policy"] for v in said[0]["verdicts"]] == first


def test_a_stop_string_keeps_the_verdict(server: Server) -> None:
    """A stop that only the API server sees still ends with a verdict."""
    whole = server.chat(max_tokens=40).choices[0].message.content
    stop = next(c for c in whole[3:] if c.isprintable() and c not in "\ufffd ")
    response = server.chat(max_tokens=40, stop=[stop])
    assert response.choices[0].finish_reason == "stop"
    assert response.saeguard["coverage"]["evaluated"] > 0


def test_a_request_can_be_stricter_but_not_choose_freely(server: Server) -> None:
    """An allowed shadow clamp changes the text; any other wish is a 400 that names the allowed."""
    free = server.chat()
    clamped = server.chat(extra_body={"vllm_xargs": {"saeguard_enforce": "test.hidden"}})
    assert clamped.saeguard["action"] == "clamp"
    assert clamped.choices[0].message.content != free.choices[0].message.content
    assert server.chat().choices[0].message.content == free.choices[0].message.content
    for xargs in ({"saeguard_enforce": "test.p0"}, {"saeguard_off": 1}):
        with pytest.raises(openai.BadRequestError, match=r"saeguard_enforce"):
            server.chat(extra_body={"vllm_xargs": xargs})


def test_a_policy_can_stop_a_request(server: Server) -> None:
    """The text ends at the token that fired, with a reason that names the policy."""
    whole = server.chat(max_tokens=40, logprobs=True)
    asked = {"extra_body": {"vllm_xargs": {"saeguard_enforce": "test.stop"}}, "max_tokens": 40}
    stopped = server.chat(logprobs=True, **asked)
    choice = stopped.choices[0]
    assert (choice.finish_reason, choice.stop_reason) == ("content_filter", "saeguard:test.stop")
    assert stopped.saeguard["action"] == "stop"
    verdict = next(v for v in stopped.saeguard["verdicts"] if v["policy"] == "test.stop")
    kept = verdict["first_token"] + 1 - stopped.usage.prompt_tokens
    assert 0 < stopped.usage.completion_tokens == kept < whole.usage.completion_tokens
    tokens = [t.token for t in whole.choices[0].logprobs.content]
    assert [t.token for t in choice.logprobs.content] == tokens[:kept]

    chunks = list(server.chat(stream=True, **asked))
    assert chunks[-1].choices[0].finish_reason == "content_filter"
    assert chunks[-1].choices[0].model_extra["stop_reason"] == "saeguard:test.stop"
    assert chunks[-1].model_extra["saeguard"]["action"] == "stop"
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert text == choice.message.content


def test_totals_are_at_metrics(server: Server) -> None:
    """Requests, tokens by what became of them, verdicts and actions by policy; no mismatch."""
    before = server.metrics()
    response = server.chat()
    after = server.metrics()

    def moved(name: str) -> float:
        return after.get(name, 0) - before.get(name, 0)

    covered = response.saeguard["coverage"]
    assert moved("saeguard_requests_total") == 1
    assert moved("saeguard_tokens_total,state=evaluated") == covered["evaluated"]
    assert moved("saeguard_tokens_total,state=not_forwarded") == 1
    assert moved("saeguard_verdicts_total,mode=enforce,policy=test.quiet,verdict=no_match") == 1
    assert moved("saeguard_actions_total,action=flag,mode=enforce,policy=test.p0") == 1
    assert after["saeguard_ledger_mismatches_total"] == 0
    assert moved("saeguard_events_total,state=produced") >= 2  # of the request, and of its match


def test_an_aborted_stream_is_accounted_for(server: Server) -> None:
    """A client that walks away leaves events that say so."""
    stream = server.chat(stream=True, max_tokens=3500)  # seconds, whatever else runs
    first = next(iter(stream))
    stream.close()
    assert {e["policy"] for e in server.told(first.id)} >= {"test.p0"}
    [event] = server.request_lines(first.id)
    assert event["finished"] == "abort"
    assert sum(event["verdicts"].values()) == event["policies"] == server.policies
    covered = event["coverage"]
    assert covered["tokens"] == covered["evaluated"] + sum(covered["skipped"].values())


def test_a_blind_server_ends(server: Server, tmp_path: Path) -> None:
    """Where the tap is not in the graph, the whole server ends, and its log says why."""
    (tmp_path / "sitecustomize.py").write_text(
        "import saeguard.vllm.worker.attach as w\nw.hook_layer = lambda layers, index: None\n"
    )
    env = environment()
    env["PYTHONPATH"] = f"{tmp_path}:{env['PYTHONPATH']}"
    done = subprocess.run(
        command(server.guarded, free_port(), "--enforce-eager", "--max-model-len", "256"),
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode != 0
    *_, why = (done.stdout + done.stderr).split("saeguard: the server did not start")
    assert "saeguard self-test: the tap at layer 1 ran 0 times" in plain(why)
    assert len(why.splitlines()) < 20, "the error is not the last thing printed"


def test_many_at_once_then_a_clean_end(server: Server) -> None:
    """Forty concurrent requests, then SIGTERM: every request has its events, no process is left."""

    def ask(i: int) -> Any:
        return server.chat(messages=[{"role": "user", "content": f"{i} " * (1 + i % 7)}])

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(40)))
    assert all(a.saeguard["policies"] == server.policies for a in answers)
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(60)
    found, lines = server.told(), server.request_lines()
    assert all(e["verdict"] == "match" for e in found)
    for answer in answers:
        mine = [e for e in found if answer.id in e["request_id"]]
        [whole] = [e for e in lines if answer.id in e["request_id"]]
        assert len({e["policy"] for e in mine}) == len(mine) == whole["verdicts"]["match"]
        assert sum(whole["verdicts"].values()) == whole["policies"] == server.policies
        assert whole["coverage"] == answer.saeguard["coverage"]
        assert {v["policy"] for v in answer.saeguard["verdicts"]} <= {e["policy"] for e in mine}
    deadline = time.monotonic() + 20
    while (left := alive(server.process.pid)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left
