"""Scopes by role on a real engine, against Transformers and the template rendered by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from saeguard.guard.places import SCOPES
from tests import models
from tests.engine import engines
from tests.guard.watchlists import coded
from tests.tiny import END

pytestmark = pytest.mark.engine

CONTENTS = ["red", "a line\nmore", "user:", "assistant: no", "long " * 9]


def by_hand(tokenizer: Any, messages: list[tuple[str, str]]) -> tuple[list[int], list[str]]:
    """Return a chat's prompt, put together piece by piece, and whose turn each token is in."""
    ids, roles = [tokenizer.bos_token_id], ["template"]
    for role, content in [*messages, ("assistant", None)]:
        for place, text in (("template", f"{role}:"), (role, content), ("template", END)):
            if content is not None or text == "assistant:":
                piece = tokenizer(text, add_special_tokens=False)["input_ids"]
                ids += piece
                roles += [place] * len(piece)
    return ids, roles


def test_verdicts_by_role(tmp_path: Path) -> None:
    """Every scope, over prompts in chunks and from the cache, and one without a template."""
    guarded = models.make_guarded(tmp_path)
    for file in guarded.policies.iterdir():
        file.unlink()
    for i, scope in enumerate(SCOPES):
        models.write_policy(
            guarded.policies / f"{scope}.yaml", id=f"test.{scope}", scope=scope,
            detect={"a": {"feature": f"f{guarded.latents[i]}", "above": 0.4},
                    "b": {"feature": f"f{guarded.latents[i + 1]}", "above": 0.3}},
            condition="a or b", **{"for": "2 of 4 tokens"},
        )  # fmt: skip
    settings = guarded.settings(events=str(tmp_path / "events.jsonl"))
    tokenizer = AutoTokenizer.from_pretrained(guarded.model)
    rng = np.random.default_rng(0)
    chats = []
    for i in range(24):
        turns = ["system"] * (i % 2) + ["user", "assistant", "tool", "user"][: 1 + i % 4]
        chats.append(by_hand(tokenizer, [(r, str(rng.choice(CONTENTS))) for r in turns]))
        messages = [{"role": r, "content": "x"} for r in turns]
        assert (
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            == by_hand(tokenizer, [(r, "x") for r in turns])[0]
        )
    plain = [5, 6, 7, 8, 9]
    chats.append((plain, ["user"] * len(plain)))
    jobs = engines.requests([ids for ids, _ in chats])
    served = engines.serve(
        tmp_path / "run",
        {"model": str(guarded.model), "enforce_eager": True, "max_num_batched_tokens": 32,
         "max_num_seqs": 8, "skip_tokenizer_init": False,
         "additional_config": {"saeguard": settings}},
        [jobs, jobs],
    )  # fmt: skip
    watchlist = engines.compile_policies(settings)
    reference = engines.Reference(guarded.model, guarded.sae)
    events = engines.events_by_request(tmp_path / "events.jsonl")
    outcomes = set()
    assert len(served.results) == 2 * len(chats)
    for result, (ids, roles) in zip(served.results, [*chats, *chats], strict=True):
        expected = reference.verdicts(watchlist, ids, result["output"], coded(roles))
        for verdict in expected:
            event = events[result["id"]][verdict.policy]
            assert event["verdict"] == verdict.outcome, json.dumps(event)
            assert event["first_token"] == verdict.first_token
            assert event["coverage"]["evaluated"] == verdict.coverage.evaluated
            outcomes.add((verdict.policy, verdict.outcome))
    assert len(outcomes) > len(SCOPES), outcomes
