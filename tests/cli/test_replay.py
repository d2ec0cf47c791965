"""`saeguard policy replay` and `explain` from the outside, on logs and recordings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from saeguard.events.reader import is_of_request
from saeguard.events.record_schema import LINE
from saeguard.events.records import ended_events, verdict_event
from saeguard.guard.judge import alone, judge, judge_text
from tests.cli.project import BOTH, BY_THRESHOLD, ONE, SET, lay_out, record, run
from tests.policy.example import read_policy

SHARES = {"weak": [0, 0, 0.3, 0.5], "strong": [0, 0, 0.9, 0.2]}


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start with one policy and the log it wrote of two requests."""
    lay_out(tmp_path, ONE)
    monkeypatch.chdir(tmp_path)
    write_log()


def write_log() -> None:
    """Judge the requests as the guard does, and write its events."""
    policy, _ = read_policy(Path("policies/p.yaml"))
    assert policy
    traces = {name: np.array(trace) for name, trace in SHARES.items()}
    lines = [
        verdict_event(
            judge(policy, {"shell_exec": t, "string_built": t}, 2),
            request_id=name, model="tiny", watchlist="0", finished="stop",
        )
        for name, t in traces.items()
    ]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines)
    for line in text.splitlines():
        LINE.validate_json(line)
    Path("log.jsonl").write_text(text)


def changed(*changes: tuple[str, str]) -> None:
    """Write the policy to ask about."""
    Path("new").mkdir(exist_ok=True)
    text = ONE
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    Path("new/p.yaml").write_text(text)


@pytest.mark.parametrize(
    ("above", "expected"),
    [
        ("0.6", {"no_match -> no_match": 1, "match -> match": 1}),
        ("0.4", {"no_match -> match": 1, "match -> match": 1}),
        ("0.95", {"no_match -> no_match": 1, "match -> no_match": 1}),
    ],
)
def test_threshold(
    capsys: pytest.CaptureFixture[str], above: str, expected: dict[str, int]
) -> None:
    """Another threshold is answered from the log alone."""
    changed(("above: 0.6", f"above: {above}"))

    options = ["--policies", "new", "--was", "policies", "--format", "json"]
    assert run("policy", "replay", "log.jsonl", *options) == 0
    [told] = json.loads(capsys.readouterr().out)["policies"]
    assert told["verdicts"] == expected


def test_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    """What a log cannot tell is unknown, and is said to be."""
    changed(("condition: shell\n", "condition: shell\nfor: 2 of 4 tokens\n"))

    assert run("policy", "replay", "log.jsonl", "--policies", "new", "--was", "policies") == 0
    out = capsys.readouterr().out
    assert "match -> unknown" in out
    assert "no_match -> no_match" in out
    assert "1 verdict unknown: an event holds a score" in out


def test_other_digest(capsys: pytest.CaptureFixture[str]) -> None:
    """Events of a policy that is not given are never unchanged; with no other, nothing is said."""
    Path("policies/p.yaml").write_text(ONE.replace("above: 0.6", "above: 0.7"))
    changed()

    assert run("policy", "replay", "log.jsonl", "--policies", "new", "--was", "policies") == 2
    said = capsys.readouterr()
    assert "none of its verdicts is of a policy in --was" in said.err
    assert "It has: unsafe-code.shell-injection " in said.err
    assert not said.out


def test_recording_agrees_with_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    """A recording answers in full what the log answers in part."""
    record(Path("r.safetensors"), {n: (t, [0] * len(t)) for n, t in SHARES.items()})
    changed(("condition: shell\n", "condition: shell\nfor: 2 of 4 tokens\n"))

    arguments = ["--policies", "new", "--was", "policies", "--format", "json"]
    assert run("policy", "replay", "r.safetensors", *arguments) == 0
    [told] = json.loads(capsys.readouterr().out)["policies"]
    assert told["verdicts"] == {"no_match -> no_match": 1, "match -> no_match": 1}


def test_bad_log(capsys: pytest.CaptureFixture[str]) -> None:
    """A broken line is told by number and field; one cut off at the end is not yet a line.

    A line of another kind of event, as a later version may write, says nothing of a request.
    """
    changed()
    lines = Path("log.jsonl").read_text()
    Path("log.jsonl").write_text('{"event": "later"}\n' + lines + '{"event": "ver')
    assert run("policy", "replay", "log.jsonl", "--policies", "new", "--was", "policies") == 0
    capsys.readouterr()

    Path("log.jsonl").write_text('{"event": "verdict"}\n')
    assert run("policy", "replay", "log.jsonl", "--policies", "new", "--was", "policies") == 2
    assert "log.jsonl:1: verdict.schema: Field required" in capsys.readouterr().err
    assert run("policy", "replay", "gone.jsonl", "--policies", "new", "--was", "policies") == 2
    assert run("policy", "replay", "log.jsonl", "--policies", "new") == 2


def write_few_lines() -> None:
    """Write the log as a server does by default: lines of matches, and of requests."""
    policy, _ = read_policy(Path("policies/p.yaml"))
    assert policy
    lines = []
    for name, trace in SHARES.items():
        rules, shares = alone(policy, dict.fromkeys(("shell_exec", "string_built"), trace))
        found = judge_text(rules, shares, np.ones(len(shares), bool), 2)
        about = {"request_id": name, "model": "tiny", "watchlist": "0", "finished": "stop"}
        lines += ended_events(found, found.telling(), **about)
    Path("log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_verdicts_without_a_line_are_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    """A log of matches says so of the others; they are never counted as unchanged."""
    write_few_lines()
    changed(("above: 0.6", "above: 0.4"))
    command = ("policy", "replay", "log.jsonl", "--policies", "new", "--was", "policies")

    assert run(*command, "--format", "json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["policies"][0]["verdicts"] == {"match -> match": 1}
    assert report["without_line"] == 1
    assert run(*command) == 0
    assert "1 verdict without a match, of any policy, with no line" in capsys.readouterr().out

    write_log()
    assert run(*command, "--format", "json") == 0
    assert json.loads(capsys.readouterr().out)["without_line"] == 0


def test_explain_a_verdict_without_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """The message tells a request that the log knows from one that it does not know."""
    write_few_lines()
    command = ("policy", "explain", "policies/p.yaml", "log.jsonl", "--request")

    assert run(*command, "strong") == 0
    assert "MATCH" in capsys.readouterr().out
    assert run(*command, "weak") == 2
    assert "The log has the line of 1 request" in capsys.readouterr().err
    assert run(*command, "gone") == 2
    assert "The log has" not in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "\n", "refusal"])
def test_a_log_without_verdicts(capsys: pytest.CaptureFixture[str], content: str) -> None:
    """Nothing was judged, which is not the same as that nothing would change."""
    line = {
        "event": "request.refused", "schema": "saeguard.event/v2", "time": "2026-01-01T00:00:00Z",
        "model": "tiny", "tenant": None, "reason": "because",
    }  # fmt: skip
    LINE.validate_python(line)
    Path("log.jsonl").write_text(json.dumps(line) + "\n" if content == "refusal" else content)

    assert run("policy", "replay", "log.jsonl", "--policies", "policies", "--was", "policies") == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("log.jsonl: the file holds no verdict")


EXPLAINED = """\
Text near

unsafe-code.shell-injection: Writes a shell command built from user text
  high severity, flags the request, in shadow: it only reports what it would do; owner \
safety-code@example.com

NO MATCH. It came 83% of the way. The score is 0.83; above 1 it matches.

The text has 8 tokens, 2 of them the prompt. The policy looks at the output: 6 tokens, 6 evaluated.

selection  feature       holds above  highest  at token  holds at
shell      shell_exec    0.6          0.9      3         3 tokens: 3-5
untrusted  string_built  0.4          0.8      4         3 tokens: 4-5, 7

Condition: shell and untrusted. It holds at 2 tokens: 4-5.
Window: 3 of 8 tokens. It is full at no token.

It comes nearest at token 7 ' t7':
  of tokens 0 to 7 the condition holds at 2; 3 are needed
  shell is 0.9 at most, above 0.6: holds
  untrusted is 0.8 at most, above 0.4: holds

Tokens 0 to 7, >>marked<< where the condition holds:
  |  t0 t1 t2 t3>> t4 t5<< t6 t7
"""


def test_explain_a_recording(capsys: pytest.CaptureFixture[str]) -> None:
    """Each selection, the condition, the window, and the words themselves."""
    Path("policies/p.yaml").write_text(BOTH)
    shell = [0.7, 0, 0, 0.9, 0.7, 0.7, 0, 0.5]
    untrusted = [0, 0, 0, 0.2, 0.8, 0.5, 0, 0.5]
    record(Path("r.safetensors"), {"near": (shell, untrusted)}, spelt=True)

    assert run("policy", "explain", "policies/p.yaml", "r.safetensors", "--request", "near") == 0
    assert capsys.readouterr().out == EXPLAINED


def test_explain_json(capsys: pytest.CaptureFixture[str]) -> None:
    """The same for programs: positions and values."""
    record(Path("r.safetensors"), {"a": ([0, 0, 0.9, 0.1], [0] * 4)})

    assert run("policy", "explain", "policies/p.yaml", "r.safetensors", "--json") == 0
    [told] = json.loads(capsys.readouterr().out)
    assert (told["verdict"], told["first_token"], told["on"]) == ("match", 2, [2])
    assert told["selections"]["shell"]["holds"] == [2]
    assert told["selections"]["shell"]["values"] == pytest.approx([0, 0, 0.9, 0.1], abs=1e-6)


def test_explain_an_event(capsys: pytest.CaptureFixture[str]) -> None:
    """An event tells the highest shares, and says what it cannot tell."""
    arguments = ["policies/p.yaml", "log.jsonl", "--request", "strong"]
    assert run("policy", "explain", *arguments) == 0
    out = capsys.readouterr().out
    assert "MATCH, first at token 2. It was on at 1 token. The score is 1.50" in out
    assert "shell      shell_exec  0.6          0.9      2         1" in out
    assert "An event holds each feature's highest share, not every token's." in out


def test_explain_an_event_of_an_earlier_policy(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing of today's policy stands beside the score of another one, whatever was changed."""
    arguments = ["policies", "log.jsonl", "--request", "strong"]
    changed = ONE.replace("above: 0.6", "above: 0.7").replace("title: ", "title: Now ")
    Path("policies/p.yaml").write_text(changed)

    assert run("policy", "explain", *arguments) == 0
    out = capsys.readouterr().out
    assert "The policy file has changed since" in out
    assert "shell_exec  0.9      2         1" in out
    assert not any(new in out for new in ("0.7", "Now", "Condition"))

    Path("policies/was.yaml").write_text(ONE.replace("mode: shadow", "mode: enforce"))
    assert run("policy", "explain", *arguments) == 0
    assert "0.7" not in capsys.readouterr().out

    Path("policies/was.yaml").write_text(ONE)
    Path("policies/p.yaml").write_text(changed.replace("mode: shadow", "mode: enforce"))
    assert run("policy", "explain", *arguments) == 0
    out = capsys.readouterr().out
    assert "shell      shell_exec  0.6          0.9      2         1" in out
    assert "0.7" not in out


def test_explain_knows_the_clients_id(capsys: pytest.CaptureFixture[str]) -> None:
    """The id in the client's response finds the request, whatever vLLM made of it."""
    made = {"chatcmpl-b1": "chatcmpl-b1-0a1b2c3d", "chatcmpl-b2": "1_chatcmpl-b2-0a1b2c3d"}
    text = Path("log.jsonl").read_text()
    for id_, logged in made.items():
        Path("log.jsonl").write_text(text.replace("strong", logged))
        assert run("policy", "explain", "policies", "log.jsonl", "--request", id_) == 0
        assert f"Request {logged}\n" in capsys.readouterr().out
    assert run("policy", "explain", "policies", "log.jsonl", "--request", "chatcmpl") == 2


@pytest.mark.parametrize(
    ("logged", "asked", "same"),
    [
        ("cmpl-9-0-0a1b2c3d", "cmpl-9", True),
        ("cmpl-9-0a1b2c3d", "cmpl-9-0a1b2c3d", True),
        ("cmpl-9", "cmpl-9", True),
        ("0_cmpl-9", "cmpl-9", True),
        ("cmpl-99-0a1b2c3d", "cmpl-9", False),
        ("cmpl-9-0-0a1b2c3d", "cmpl-9-1", False),
        ("cmpl-9-0a1b2c3d", "cmpl.9", False),
    ],
)
def test_ids_of_one_request(logged: str, asked: str, *, same: bool) -> None:
    """Ids that vLLM makes of the client's belong to it; ids that only look alike do not."""
    assert is_of_request(logged, asked) is same


def test_explain_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """A request that is not there is bad input, and the ids that are there are named."""
    record(Path("r.safetensors"), {"a": ([0, 0, 0.9, 0.1], [0] * 4)})

    assert run("policy", "explain", "policies/p.yaml", "log.jsonl", "--request", "x") == 2
    assert "there is no event of unsafe-code.shell-injection" in capsys.readouterr().err
    assert run("policy", "explain", "policies/p.yaml", "r.safetensors", "--request", "x") == 2
    assert "there is no text 'x'; there are: a" in capsys.readouterr().err
    assert run("policy", "explain", "policies/p.yaml") == 2


TOLD = (
    "feature set demo/unsafe-code: TopK latents are approximate: measured thresholds stand for "
    "ranks (k = 4); worst of 2 latents on 1,000 tokens: precision 0.9 (95 %: 0.8 to 0.95), recall "
    "0.9 (95 %: 0.8 to 0.95)"
)


def test_approximate_ranks_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Where thresholds stand for ranks, `explain` and `replay` say so, as serving does."""
    shares = {"a": ([0, 0, 0.9, 0.1], [0] * 4)}
    record(Path("r.safetensors"), shares)
    explain = ("policy", "explain", "policies/p.yaml", "r.safetensors")
    replay = ("policy", "replay", "r.safetensors", "--policies", "policies")
    for command in (explain, replay):
        assert run(*command) == 0
        assert "approximate" not in capsys.readouterr().out

    SET.write_text(BY_THRESHOLD)
    record(Path("r.safetensors"), shares)
    for command in (explain, replay):
        assert run(*command) == 0
        assert TOLD in capsys.readouterr().out.splitlines()
    assert run(*explain, "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["approximate"] is True
    assert run(*replay, "--format", "json") == 0
    told = json.loads(capsys.readouterr().out)["approximate"]
    assert told == {"demo/unsafe-code": TOLD.split("latents are ", 1)[1]}


def test_approximate_events_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a log, by what its events say, whatever the feature set says today."""
    changed()
    explain = ("policy", "explain", "policies/p.yaml", "log.jsonl")
    replay = ("policy", "replay", "log.jsonl", "--policies", "new", "--was", "policies")
    for command in (explain, replay):
        assert run(*command) == 0
        assert "approximate" not in capsys.readouterr().out

    log = Path("log.jsonl").read_text()
    Path("log.jsonl").write_text(log.replace('"approximate": false', '"approximate": true'))
    assert run(*explain) == 0
    out = capsys.readouterr().out
    assert out.count("latents were approximate: measured thresholds stood for ranks.") == 2
    assert run(*replay) == 0
    assert (
        "2 events of unsafe-code.shell-injection shadow: TopK latents were approximate: measured "
        "thresholds stood for ranks"
    ) in capsys.readouterr().out.splitlines()
    assert run(*replay, "--format", "json") == 0
    told = json.loads(capsys.readouterr().out)["approximate_events"]
    assert told == {"unsafe-code.shell-injection shadow": 2}
