"""What a response says of a request, by the verdicts of its policies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from saeguard.guard.compiled_rules import compile_rules
from saeguard.guard.judge import judge_text
from saeguard.vllm.engine_core.response import response
from tests.policy.example import policy


def said(folder: Path, mode: str, trace: list[float], prompt_tokens: int) -> dict[str, object]:
    """Return the response about a request with the shares `trace`."""
    changes = [("untrusted: {feature: string_built", "untrusted: {feature: shell_exec")]
    changes += [("for: 3 of 8 tokens", "for: 1 of 1 tokens"), ("mode: shadow", f"mode: {mode}")]
    judged = policy(folder, *changes)
    rules = compile_rules([judged], {"demo/unsafe-code/shell_exec": 0})
    shares = np.array(trace)[:, None]
    verdicts = judge_text(rules, shares, np.ones(len(trace), bool), prompt_tokens)
    return dict(response(verdicts, {}, "0" * 64, request_id="a-1"))


@pytest.mark.parametrize(
    ("mode", "shares", "prompt_tokens", "flagged", "not_evaluated"),
    [
        ("enforce", [0.0, 0.0, 0.9], 2, True, 0),
        ("shadow", [0.0, 0.0, 0.9], 2, False, 0),
        ("enforce", [0.0, 0.0, 0.1], 2, False, 0),
        ("enforce", [0.0, 0.0, 0.9], 3, None, 1),  # all of it is prompt, the scope is the output
        ("shadow", [0.0, 0.0, 0.9], 3, None, 1),
        ("enforce", [0.0, 0.0, np.nan], 2, None, 0),
    ],
)
def test_what_was_not_judged_is_not_clean(
    tmp_path: Path,
    mode: str,
    shares: list[float],
    prompt_tokens: int,
    flagged: bool | None,
    not_evaluated: int,
) -> None:
    """`flagged` is false only if a policy has looked and found nothing."""
    found = said(tmp_path, mode, shares, prompt_tokens)

    assert found["flagged"] is flagged
    assert found["not_evaluated"] == not_evaluated
    assert found["errors"] == int(np.isnan(shares).any())
    assert found["request_id"] == "a-1"
