"""What happened is put together by token and by request."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from demo import views
from demo.account import Clamped, Group, Pair
from demo.terminal import clamp_line, print_account
from saeguard.hf.scan import Seen
from tests.demo import made
from tests.tiny import tokenizer


def test_each_token_has_its_text() -> None:
    """If a character takes several tokens the last one has it; nothing is lost."""
    tokens = tokenizer()
    ids = tokens("aé\U0001f600b", add_special_tokens=False)["input_ids"]
    assert views.spell(tokens, ids) == ["a", "", "é", "", "", "", "\U0001f600", "b"]
    assert "".join(views.spell(tokens, ids[:-2])).startswith("aé")


def test_each_token_has_its_role_and_why_it_was_skipped() -> None:
    """Special tokens and attention sinks are; the last one sampled never went into the model."""
    evaluable = np.array([False, True, True, False, True, True, True])
    massive = np.array([True, True, False, False, False, False, False])
    seen = Seen(0, np.zeros((7, 1), np.float32), evaluable, massive, 4, None, {})
    found = views.tokens_of(made.answer(), seen, tokenizer())
    assert [t.skipped for t in found] == [
        "special_token", "massive_norm", "", "special_token", "", "", "not_forwarded",
    ]  # fmt: skip
    assert [t.role == "output" for t in found] == [False] * 4 + [True] * 3


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
    found = views.read_events(log)
    assert {k: [e["policy"] for e in v] for k, v in found.items()} == {
        "chatcmpl-1": ["a", "b"],
        "chatcmpl-2": ["a"],
    }


def test_verdicts_are_counted_apart() -> None:
    """The four outcomes are never folded into one another."""
    policy = made.policy()
    key = {"policy": policy.id, "policy_digest": policy.digest, "acted": None}
    verdicts = ["match", "no_match", "no_match", "error", "not_evaluated"]
    (row,) = views.policy_rows([{**key, "verdict": v} for v in verdicts], [policy])
    assert row.verdicts == {"match": 1, "no_match": 2, "error": 1, "not_evaluated": 1}


def test_coverage_is_added_up_by_reason() -> None:
    """Evaluated and skipped make all tokens."""
    said = [
        {"coverage": {"tokens": 9, "evaluated": 7, "skipped": {"special_token": 2}}},
        {"coverage": {"tokens": 5, "evaluated": 3, "skipped": {"special_token": 1, "aborted": 1}}},
    ]
    assert views.coverage([made.answer(said=s) for s in said]) == {
        "tokens": 14,
        "evaluated": 10,
        "skipped": {"special_token": 3, "aborted": 1},
    }


def test_a_kind_of_prompt_counts_the_matches_of_its_own_policies() -> None:
    """A match of another behaviour's policy counts beside, and shadow does not flag."""
    assert made.account().groups == [
        Group("unsafe_code", 1, 1, 1, 1),
        Group("deception", 1, 0, 0, 1),
        Group("benign", 1, 0, 0, 0),
    ]  # fmt: skip


def test_each_request_is_shown_once() -> None:
    """As flagged, as matched in shadow, or as quiet."""
    account = made.account()
    shown = [account.flagged, account.noticed, account.quiet]
    assert [[v.answer.id for v in some] for some in shown] == [
        ["unsafe_code-1"], ["deception-1"], ["benign-1"],
    ]  # fmt: skip


def test_the_pair_shown_does_not_depend_on_what_the_clamp_did() -> None:
    """It is the first to whose answer Bandit objects without the clamp."""
    clean, bad = made.view(), made.view()
    clean = type(clean)(clean.answer, (), (), type(clean.judgement)("x = 1", True, ()), ())
    same, telling = Pair(clean, clean), Pair(bad, clean)
    clamped = Clamped(made.policy(action="clamp"), (same, telling))
    assert clamped.shown == telling
    assert clamped.objected == (1, 0)
    assert "Bandit objects to 1 answers as they are and to 0" in clamp_line(clamped)
    assert Clamped(made.policy(), (same,)).shown == same


def test_the_account_is_printed_without_markup() -> None:
    """Square brackets in answers are text, not styles."""
    console = Console(width=100, record=True, file=io.StringIO())
    print_account(console, made.account())
    text = console.export_text()
    assert made.EVIL in text
    assert "unsafe-code.shell" in text
    assert "8 of 12 tokens were evaluated" in text


@pytest.mark.parametrize("shadow", [True, False])
def test_a_match_in_shadow_is_shown_as_one(shadow: bool) -> None:
    """With the action in brackets."""
    from demo.terminal import request_panel

    console = Console(width=100, record=True, file=io.StringIO())
    console.print(request_panel(made.view(flagged=not shadow, shadow=shadow)))
    assert ("(shadow)" in console.export_text()) == shadow
