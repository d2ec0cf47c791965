"""A small account, made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from demo.account import Account, Hit, Pair, PolicyRow, RequestView, Token, Trace
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
            "feature_set": "demo",
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
    """An answer."""
    return Answer(
        **{
            "id": "unsafe_code-0",
            "behaviour": "unsafe_code",
            "messages": ({"role": "user", "content": f"Do it {EVIL}"},),
            "text": EVIL,
            "prompt_ids": (1, 10, 11),
            "token_ids": (12, 13, 2),
            "finish": "stop",
            "streamed": False,
            "response_id": "chatcmpl-1",
            "said": {"flagged": True, "verdicts": [], "coverage": {}},
            "seconds": 0.5,
            **fields,
        }
    )


def tokens() -> tuple[Token, ...]:
    """BOS, two of the prompt, then three of the output; the last was never read."""
    return (
        Token("<|user|>", 9.0, "special"),
        Token("Do it", 0.02, "prompt"),
        Token(f" {EVIL}", 0.3, "prompt"),
        Token("<|assistant|>", 9.0, "special"),
        Token(EVIL, 0.9, "output"),
        Token("\n", 0.6, "output"),
        Token("end", 0.7, "unread"),
    )


def view(*, flagged: bool = True, **fields: Any) -> RequestView:
    """A request, flagged or not."""
    trace = Trace("shell", 0.5, tokens(), 4)
    hit = Hit(policy(), "flag", 1.8, 4, 1, (trace,))
    finding = Finding("B602", "high", 2, f"shell {EVIL}")
    return RequestView(
        answer=answer(said={"flagged": flagged, "verdicts": [], "coverage": {}}, **fields),
        hits=(hit,) if flagged else (),
        shadow=(),
        judgement=Judgement(f"import os\n{EVIL}", parses=True, findings=(finding,)),
        seconds=0.5,
    )


def account() -> Account:
    """One flagged request, one benign one, and a pair."""
    flagged = view()
    quiet = view(flagged=False, id="benign-0", behaviour="benign")
    return Account(
        views=(flagged, quiet),
        pairs=(Pair(flagged, quiet),),
        clamp=policy(id="unsafe-code.clamp", action="clamp"),
        policies=(
            PolicyRow(policy(), {"match": 1, "no_match": 1, "error": 0, "not_evaluated": 0}, 1),
        ),
        coverage={"tokens": 12, "evaluated": 8, "skipped": {"special_token": 2, "aborted": 2}},
        disagreement=0.0001,
        facts={"model": EVIL},
    )
