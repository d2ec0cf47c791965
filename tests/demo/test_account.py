"""Answers, events and shares are put together by token and by request."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from demo import account as told
from demo.terminal import print_account
from tests.demo import made
from tests.tiny import tokenizer


def test_each_token_has_its_text() -> None:
    """Where a character takes several tokens the last one has it; nothing is lost."""
    tokens = tokenizer()
    ids = tokens("aé\U0001f600b", add_special_tokens=False)["input_ids"]
    assert told.pieces(tokens, ids) == ["a", "", "é", "", "", "", "\U0001f600", "b"]
    assert "".join(told.pieces(tokens, ids[:-2])).startswith("aé")


def test_the_last_token_sampled_counts_as_unread() -> None:
    """Special tokens are told apart, in prompt and output."""
    parts = told._parts(made.answer(), excluded=(1, 12))
    assert parts == ["special", "prompt", "prompt", "special", "output", "unread"]


def test_a_last_token_that_is_special_is_unread_too() -> None:
    """It is both; what matters is that nobody looked."""
    assert told._parts(made.answer(), excluded=(2,))[-1] in ("special", "unread")


def test_events_are_found_by_the_response_they_belong_to(tmp_path: Path) -> None:
    """The engine's request ids carry a suffix; other events are passed over."""
    log = tmp_path / "events.jsonl"
    events = [
        {"event": "verdict", "request_id": "chatcmpl-1-abcd0123", "policy": "a"},
        {"event": "verdict", "request_id": "chatcmpl-1-abcd0123", "policy": "b"},
        {"event": "start"},
        {"event": "verdict", "request_id": "chatcmpl-2-abcd0124", "policy": "a"},
    ]
    log.write_text("".join(json.dumps(e) + "\n" for e in events), encoding="utf-8")
    found = told.read_events(log)
    assert {k: [e["policy"] for e in v] for k, v in found.items()} == {
        "chatcmpl-1": ["a", "b"],
        "chatcmpl-2": ["a"],
    }


def test_verdicts_are_counted_apart() -> None:
    """The four outcomes are never folded into one another."""
    policy = made.policy()
    key = {"policy": policy.id, "policy_digest": policy.digest, "acted": None}
    verdicts = ["match", "no_match", "no_match", "error", "not_evaluated"]
    (row,) = told.policy_rows([{**key, "verdict": v} for v in verdicts], [policy])
    assert row.verdicts == {"match": 1, "no_match": 2, "error": 1, "not_evaluated": 1}


def test_coverage_is_added_up_by_reason() -> None:
    """Evaluated and skipped make all tokens."""
    said = [
        {"coverage": {"tokens": 9, "evaluated": 7, "skipped": {"special_token": 2}}},
        {"coverage": {"tokens": 5, "evaluated": 3, "skipped": {"special_token": 1, "aborted": 1}}},
    ]
    assert told.coverage([made.answer(said=s) for s in said]) == {
        "tokens": 14,
        "evaluated": 10,
        "skipped": {"special_token": 3, "aborted": 1},
    }


def test_a_kind_of_prompt_is_flagged_by_its_own_policies() -> None:
    """A false alarm on another subject does not count for it."""
    assert made.account().groups == [("unsafe code", 1, 1, 1), ("benign", 1, 0, 0)]


def test_the_pair_shown_is_the_first_with_something_to_prevent() -> None:
    """It is chosen by a rule that does not look at what the clamp did."""
    clean = made.view()
    assert made.account().shown_pair == made.account().pairs[0]
    assert told.Pair(clean, clean).telling


def test_the_account_is_printed_without_markup() -> None:
    """Square brackets in answers are text, not styles."""
    console = Console(width=100, record=True, file=io.StringIO())
    print_account(console, made.account())
    text = console.export_text()
    assert made.EVIL in text
    assert "unsafe-code.shell" in text
    assert "8 of 12 tokens were evaluated" in text
