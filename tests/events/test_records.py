"""Every event is valid under the published schema, and holds no text."""

from __future__ import annotations

import json
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saeguard.events.record_schema import LINE, Event, Skipped, json_schema
from saeguard.events.records import SCHEMA, ended_events, mismatch_event, verdict_event
from saeguard.events.sink import Sink
from saeguard.guard.judge import judge_text
from saeguard.guard.request_verdicts import Verdicts
from saeguard.guard.verdict import Coverage, Outcome, Reason, Verdict
from saeguard.policy.types import Action, Mode, Severity
from tests.guard.watchlists import (
    FEATURES,
    coded,
    make_watchlist,
    random_activations,
    random_policy,
    random_roles,
    seeded,
)

SHIPPED = json.loads(
    resources.files("saeguard.events").joinpath("event.v3.json").read_text(encoding="utf-8")
)
VALIDATOR = jsonschema.Draft202012Validator(
    SHIPPED, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
)


def verdicts(seed: int) -> Verdicts:
    """Return random verdicts, errors and texts without tokens in scope among them."""
    rng = seeded(seed)
    tokens = rng.randint(1, 10)
    watchlist = make_watchlist([random_policy(rng, f"p{i}") for i in range(4)])
    f = random_activations(rng, tokens)
    if rng.random() < 0.3:
        f[rng.randrange(tokens)] = np.nan
    evaluable = np.array([rng.random() < 0.8 for _ in range(tokens)])
    prompt = rng.randint(0, tokens)
    roles = coded(random_roles(rng, prompt))
    return judge_text(watchlist.rules, watchlist.shares(f), evaluable, prompt, roles)


REQUEST = {"request_id": "7-ab12", "model": "demo", "watchlist": "0" * 64, "finished": "stop"}


def written(verdict: Verdict, **more: Any) -> dict[str, Any]:
    """Return a verdict's event."""
    return dict(verdict_event(verdict, **{**REQUEST, **more}))


def test_the_shipped_schema_is_current() -> None:
    """`event.v3.json` is what the model of an event says; see the message for how to renew it."""
    renew = "python -m saeguard.events.record_schema > saeguard/events/event.v3.json"
    assert json_schema() == SHIPPED, renew


def test_the_shipped_schema_is_a_schema() -> None:
    """It is valid itself, names its version, and describes every property."""
    jsonschema.Draft202012Validator.check_schema(SHIPPED)
    assert SHIPPED["$id"] == SCHEMA
    parts = SHIPPED["$defs"].values()
    assert [
        n for part in parts for n, p in part["properties"].items() if not p.get("description")
    ] == []


@given(st.integers(0, 2**32 - 1))
@settings(derandomize=True, deadline=None, max_examples=100)
def test_every_event_is_valid(seed: int) -> None:
    """As it is built, as JSON, and under the typed model."""
    for verdict in verdicts(seed):
        event = written(verdict)
        VALIDATOR.validate(json.loads(json.dumps(event, allow_nan=False)))
        Event.model_validate(event)


@given(st.integers(0, 2**32 - 1))
@settings(derandomize=True, deadline=None, max_examples=100)
def test_a_request_has_lines_of_what_it_found(seed: int) -> None:
    """One for each match and error, or for every verdict, and its own last, which counts all."""
    found = verdicts(seed)
    outcomes = Counter(v.outcome for v in found)
    few = list(ended_events(found, found.telling(), **REQUEST))
    every = list(ended_events(found, None, **REQUEST))

    for lines in (few, every):
        for line in lines:
            VALIDATOR.validate(json.loads(json.dumps(line, allow_nan=False)))
        assert [line["event"] for line in lines] == ["verdict"] * (len(lines) - 1) + ["request"]
        assert lines[-1]["verdicts"] == outcomes
        assert lines[-1]["policies"] == len(found)
    assert [e["verdict"] for e in every[:-1]] == [v.outcome for v in found]
    assert few[:-1] == [e for e in every[:-1] if e["verdict"] in {"match", "error"}]


def test_lines_of_the_version_before_are_read() -> None:
    """A log that was begun before an upgrade stays readable; the reader takes both versions."""
    for event in map(written, verdicts(0)):
        assert LINE.validate_python({**event, "schema": "saeguard.event/v2"})


def test_a_written_line_is_valid(tmp_path: Path) -> None:
    """The sink adds a time, which the schema knows."""
    sink = Sink(tmp_path / "events.jsonl")
    for verdict in verdicts(0):
        sink.put(lambda v=verdict: written(v))
    sink.close()

    lines = (tmp_path / "events.jsonl").read_text().splitlines()

    assert len(lines) == 4
    for line in lines:
        VALIDATOR.validate(json.loads(line))
        assert json.loads(line)["time"]


@pytest.mark.parametrize(
    ("key", "bad"),
    [
        ("verdict", "maybe"),
        ("schema", "saeguard.event/v1"),
        ("matched_tokens", -1),
        ("score", "high"),
        ("text", "what the user wrote"),
        ("coverage", {"tokens": 1, "evaluated": 0, "skipped": {"tired": 1}}),
    ],
)
def test_what_is_no_event_is_refused(key: str, bad: Any) -> None:
    """The schema is strict; keys for text are not in it."""
    event = written(verdicts(0)[0])

    assert not VALIDATOR.is_valid({**event, key: bad})


def test_a_missing_key_is_refused() -> None:
    """All keys but the sink's are always there; `approximate` is younger than some logs."""
    event = written(verdicts(0)[0])

    assert [k for k in event if VALIDATOR.is_valid({x: v for x, v in event.items() if x != k})] == [
        "approximate"
    ]


def test_closed_lists_are_the_guards_own() -> None:
    """The schema names the outcomes, reasons, actions, modes and severities that there are."""
    properties = SHIPPED["$defs"]["Event"]["properties"]

    assert properties["verdict"]["enum"] == list(get_args(Outcome))
    assert list(Skipped.model_fields) == list(get_args(Reason))
    assert properties["action"]["enum"] == list(get_args(Action))
    assert properties["mode"]["enum"] == list(get_args(Mode))
    assert properties["severity"]["enum"] == list(get_args(Severity))


def test_a_ledger_that_does_not_add_up_is_an_event() -> None:
    """Under the same schema, told apart by its kind."""
    coverage = Coverage(3, 1, {"not_forwarded": 1})

    event = mismatch_event(
        coverage, request_id="7-ab12", model="demo", watchlist="0" * 64, finished="stop"
    )

    assert event["event"] == "ledger_mismatch"
    assert VALIDATOR.is_valid(event)


def test_no_text_is_in_an_event() -> None:
    """The policy's prose, its path and the text itself stay out; ids and numbers come in."""
    for seed in range(20):
        for verdict in verdicts(seed):
            event = written(verdict)
            strings = _strings(event)
            known = {"7-ab12", "demo", "stop", "0" * 64, verdict.policy, verdict.digest, SCHEMA}
            closed = {"verdict", *get_args(Outcome), *get_args(Action), *get_args(Mode)}
            closed |= {*get_args(Severity), *get_args(Reason), "not_read"}
            assert strings <= known | closed | {f"f{j}" for j in range(FEATURES)} | set(event) | {
                "count", "max", "at", "tokens", "evaluated", "skipped"
            }  # fmt: skip


def _strings(value: Any) -> set[str]:
    if isinstance(value, str):
        return {value}
    if isinstance(value, dict):
        return set(value).union(*map(_strings, value.values()))
    return set()
