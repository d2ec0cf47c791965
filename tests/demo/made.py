"""A small account, made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from demo.account import Account, Clamped, Hit, Pair, PolicyRow, RequestView, Token, Trace
from demo.ask import Answer
from demo.judge import Finding, Judgement
from saeguard.policy.types import Name, Policy, Selection, Window

EVIL = "<script>alert('x')</script>[/red]"


def policy(**fields: Any) -> Policy:
    """A policy."""
    return Policy(
        **{
            "id": "unsafe-code.shell",
            "title": f"Shell {EVIL}",
            "owner": "o@example.com",
            "severity": "high",
            "mode": "enforce",
            "action": "flag",
            "on_error": "allow",
            "scope": "output",
            "uncached": "count",
            "feature_set": "smollm2",
            "rationale": "because",
            "falsepositives": (),
            "review_by": None,
            "detect": {"a": Selection("shell", 0.5)},
            "condition": Name("a"),
            "window": Window(),
            "keep": 0,
            "clamp": None,
            "exceptions": (),
            "path": Path("p.yaml"),
            "digest": "d" * 64,
            **fields,
        }
    )


def answer(**fields: Any) -> Answer:
    """A streamed answer of three tokens."""
    return Answer(
        **{
            "id": "unsafe_code-1",
            "behaviour": "unsafe_code",
            "messages": ({"role": "user", "content": f"Do it {EVIL}"},),
            "text": EVIL,
            "prompt_ids": (1, 10, 11, 1),
            "token_ids": (12, 13, 2),
            "finish": "stop",
            "streamed": True,
            "response_id": "chatcmpl-1",
            "said": {"flagged": True, "verdicts": [], "coverage": {}},
            "seconds": 0.5,
            "arrived": (0.2, 0.3, 0.5),
            **fields,
        }
    )


def tokens() -> tuple[Token, ...]:
    """A role mark, two tokens of the user, a role mark, three of the output, the last unread."""
    return (
        Token("<|im_start|>", 9.0, "template", "special_token"),
        Token("Do it", 0.02, "user"),
        Token(f" {EVIL}", 0.3, "user"),
        Token("<|im_start|>", 9.0, "template", "special_token"),
        Token(EVIL, 0.9, "output"),
        Token("\n", 0.6, "output"),
        Token("end", 0.7, "output", "not_forwarded"),
    )


def view(*, flagged: bool = True, shadow: bool = False, **fields: Any) -> RequestView:
    """A request: flagged, matched in shadow, or neither."""
    trace = Trace("shell", 0.5, tokens(), 4)
    hit = Hit(policy(), None if shadow else "flag", 1.8, 4, 1, (trace,))
    finding = Finding("B602", "high", 2, f"shell {EVIL}")
    return RequestView(
        answer=answer(said={"flagged": flagged, "verdicts": [], "coverage": {}}, **fields),
        hits=(hit,) if flagged else (),
        shadow=(hit,) if shadow else (),
        judgement=Judgement(f"import os\n{EVIL}", parses=True, findings=(finding,)),
        tokens=tokens(),
    )


def account() -> Account:
    """One flagged request, one that matched in shadow, one ordinary, and a pair."""
    flagged = view()
    noticed = view(flagged=False, shadow=True, id="deception-1", behaviour="deception")
    quiet = view(flagged=False, id="benign-1", behaviour="benign", token_ids=(12, 14, 2))
    return Account(
        views=(flagged, noticed, quiet),
        clamped=(Clamped(policy(id="unsafe-code.clamp", action="clamp"), (Pair(flagged, quiet),)),),
        policies=(
            PolicyRow(policy(), {"match": 1, "no_match": 1, "error": 0, "not_evaluated": 0}, 1),
        ),
        coverage={"tokens": 12, "evaluated": 8, "skipped": {"special_token": 2, "aborted": 2}},
        disagreement=0.0001,
        facts={"model": EVIL},
    )
