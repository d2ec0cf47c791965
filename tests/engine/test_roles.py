"""Scopes by role on a real engine, against Transformers and the template rendered by itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from saeguard.guard.scopes import SCOPES
from saeguard.guard.watchlist import WatchList
from tests import models
from tests.engine import engines
from tests.guard.watchlists import coded
from tests.tiny import Chat, chat_by_hand

pytestmark = pytest.mark.engine

CONTENTS = ["red", "a line\nmore", "user:", "assistant: no", "long " * 9]
PLAIN = [5, 6, 7, 8, 9]
"""A prompt that no template wrote."""
ABOVE, TO, CHOICES = 0.5, -6.0, 3
CLAMPED, TOKENS = 8, 6
"""Chats that are clamped, and how far they go on: the reference computes each token anew."""


@dataclass(frozen=True)
class Clamp:
    """When a clamp policy edits, and what that means."""

    when: str
    detect: int
    clamp: int
    on: Callable[[np.ndarray, np.ndarray], np.ndarray]
    """From where it looks, and where it looks and its latent fires, to what is edited."""


CLAMPS = {
    "user": Clamp("always", 32, 36, lambda looks, _: looks),
    "tool": Clamp("matched", 40, 44, lambda _, fires: fires),
    "system": Clamp("rest", 48, 52, lambda _, fires: np.logical_or.accumulate(fires)),
    "assistant": Clamp("matched", 56, 60, lambda _, fires: fires),
}
"""By scope."""


class ClampedReference(engines.Reference):
    """Transformers with a plain forward hook; the whole text again at every step."""

    def __init__(self, guarded: models.Guarded) -> None:
        """Edit nothing until told to."""
        super().__init__(guarded.model, guarded.sae)
        self.clamp: Clamp | None = None
        self.looks = np.zeros(0, bool)
        engines.blocks(self.model)[self.layer].register_forward_hook(self._edit)

    def _edit(self, _module: Any, _args: Any, output: Any) -> Any:
        if self.clamp is None:
            return output
        x = output[0] if isinstance(output, tuple) else output
        f = self.sae.encode(x[0])
        fires = (f[:, self.clamp.detect] > ABOVE).numpy()
        on = torch.from_numpy(self.clamp.on(self.looks, self.looks & fires))
        delta = (TO - f[:, self.clamp.clamp])[:, None] * self.sae.W_dec[self.clamp.clamp]
        x = x.clone()
        x[0, on] += delta[on]
        return (x, *output[1:]) if isinstance(output, tuple) else x

    @torch.no_grad()
    def generate(self, chat: Chat, scope: str | None, looks_at: Sequence[str] = ()) -> list[int]:
        """Continue greedily under the clamp of a scope, as if it looked at other places."""
        prompt, roles = chat
        answers = {"assistant": ("assistant", "output", "continued")}
        places = looks_at or answers.get(str(scope), (scope,))
        text = list(prompt)
        for _ in range(TOKENS):
            by_place = [*roles, *["output"] * (len(text) - len(prompt))]
            self.looks = np.isin(by_place, places)
            self.clamp = None if scope is None else CLAMPS[scope]
            text.append(int(self.model(torch.tensor([text])).logits[0, -1].argmax()))
        self.clamp = None
        return text[len(prompt) :]


def make_chats(tokenizer: Any) -> list[Chat]:
    """Return prompts by hand, which Transformers must render alike, and one without a template.

    Every sixth ends with a part of the answer, which the model is to continue.
    """
    rng = np.random.default_rng(0)
    chats = []
    for i in range(24):
        turns = ["system"] * (i % 2) + ["user", "assistant", "tool", "user"][: 1 + i % 4]
        part = "so far" if i % 6 == 5 else ""
        chats.append(chat_by_hand([(r, str(rng.choice(CONTENTS))) for r in turns], part))
        messages = [{"role": r, "content": "x"} for r in turns]
        how = {"add_generation_prompt": True}
        if part:
            messages.append({"role": "assistant", "content": part})
            how = {"continue_final_message": True}
        assert (
            tokenizer.apply_chat_template(messages, return_dict=False, **how)
            == chat_by_hand([(r, "x") for r in turns], part)[0]
        )
    return [*chats, (PLAIN, ["user"] * len(PLAIN))]


def make_policies(guarded: models.Guarded) -> None:
    """Replace the policies by one of each scope, and clamps that requests may have enforced."""
    for file in guarded.policies.iterdir():
        file.unlink()
    for i, scope in enumerate(SCOPES):
        models.write_policy(
            guarded.policies / f"{scope}.yaml", id=f"test.{scope}", scope=scope,
            detect={"a": {"feature": f"f{guarded.latents[i]}", "above": 0.4},
                    "b": {"feature": f"f{guarded.latents[i + 1]}", "above": 0.3}},
            condition="a or b", **{"for": "2 of 4 tokens"},
        )  # fmt: skip
    for scope, clamp in CLAMPS.items():
        models.write_policy(
            guarded.policies / f"clamp-{scope}.yaml", id=f"clamp.{scope}", scope=scope,
            mode="shadow", action="clamp", condition="a",
            detect={"a": {"feature": f"f{clamp.detect}", "above": ABOVE}},
            clamp={"features": [f"f{clamp.clamp}"], "to": TO, "when": clamp.when},
        )  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What one engine served, and what it is held against."""

    chats: list[Chat]
    plain: list[dict[str, Any]]
    """Results of every chat twice, the second time from the cache."""
    sampled: list[dict[str, Any]]
    """Of every chat, `CHOICES` each."""
    clamped: dict[str, list[dict[str, Any]]]
    """By scope, of the first chats, two equal choices each."""
    reference: ClampedReference
    watchlist: WatchList
    events: dict[str, dict[str, dict[str, Any]]]

    def check(self, result: dict[str, Any], chat: Chat) -> set[tuple[str, str]]:
        """Hold the events of one choice against the reference; return its outcomes by policy."""
        ids, roles = chat
        assert result["prompt"] == ids
        outcomes = set()
        expected = self.reference.verdicts(self.watchlist, ids, result["output"], coded(roles))
        for verdict in expected:
            event = self.events[result["id"]][verdict.policy]
            assert event["verdict"] == verdict.outcome, json.dumps(event)
            assert event["first_token"] == verdict.first_token
            covered = event["coverage"]
            assert covered["evaluated"] == verdict.coverage.evaluated
            unread = covered["skipped"].get("not_forwarded", 0)
            assert covered["tokens"] - unread == verdict.coverage.tokens
            outcomes.add((verdict.policy, verdict.outcome))
        return outcomes


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Serve prompts in chunks and from the cache, with several choices, and clamped."""
    folder = tmp_path_factory.mktemp("roles")
    guarded = models.make_guarded(folder)
    make_policies(guarded)
    events = folder / "events.jsonl"
    settings = guarded.settings(
        events=str(events), request_may_enforce=[f"clamp.{s}" for s in CLAMPS]
    )
    chats = make_chats(AutoTokenizer.from_pretrained(guarded.model))
    prompts = [ids for ids, _ in chats]
    jobs = engines.requests(prompts)
    sampled = engines.requests(prompts, n=CHOICES, temperature=1.0)
    # One token to choose from makes sampling greedy, which alone may not have two choices.
    clamped = [
        engines.requests(
            prompts[:CLAMPED],
            n=2,
            temperature=1.0,
            top_k=1,
            max_tokens=TOKENS,
            extra_args={"saeguard_enforce": f"clamp.{s}"},
        )
        for s in CLAMPS
    ]
    served = engines.serve(
        folder / "run",
        {"model": str(guarded.model), "enforce_eager": True, "max_num_batched_tokens": 32,
         "max_num_seqs": 8, "skip_tokenizer_init": False,
         "additional_config": {"saeguard": settings}},
        [jobs, jobs, sampled, *clamped],
    )  # fmt: skip
    count = len(chats)
    ends = np.cumsum([2 * count, CHOICES * count, *[2 * CLAMPED] * len(CLAMPS)])
    assert len(served.results) == ends[-1]
    plain, many, *rest = (
        served.results[end - n : end] for n, end in zip(np.diff(ends, prepend=0), ends, strict=True)
    )
    return Run(
        chats, plain, many, dict(zip(CLAMPS, rest, strict=True)), ClampedReference(guarded),
        engines.compile_policies(settings), engines.events_by_request(events),
    )  # fmt: skip


def test_verdicts_by_role(run: Run) -> None:
    """Every scope, over prompts in chunks and from the cache, and one without a template."""
    outcomes = set()
    for result, chat in zip(run.plain, run.chats * 2, strict=True):
        outcomes |= run.check(result, chat)
    assert len(outcomes) > len(SCOPES), outcomes
    assert any(result["cached"] for result in run.plain)


def test_a_plain_completion_is_the_users(run: Run) -> None:
    """Coverage says so: every token of a prompt without a turn is the user's, none anybody's."""
    for result in (run.plain[len(run.chats) - 1], run.plain[-1]):
        assert result["prompt"] == PLAIN
        events = run.events[result["id"]]
        tokens = {s: events[f"test.{s}"]["coverage"]["tokens"] for s in SCOPES}
        output = len(result["output"])
        assert tokens == {
            "prompt": len(PLAIN), "output": output, "both": len(PLAIN) + output,
            "assistant": output, "user": len(PLAIN), "system": 0, "tool": 0,
        }  # fmt: skip
        assert events["test.user"]["coverage"]["evaluated"] == len(PLAIN)
        assert events["test.user"]["score"] is not None
        for absent in ("system", "tool"):
            assert events[f"test.{absent}"]["verdict"] == "not_evaluated"


def test_a_part_of_the_answer_is_output(run: Run) -> None:
    """It counts for policies on the output, whoever else looks at it."""
    parts = [(c, r) for c, r in zip(run.chats, run.plain, strict=False) if "continued" in c[1]]
    assert len(parts) == 4
    for (ids, roles), result in parts:
        events = run.events[result["id"]]
        tokens = {s: events[f"test.{s}"]["coverage"]["tokens"] for s in SCOPES}
        assert tokens["output"] == roles.count("continued") + len(result["output"])
        assert tokens["prompt"] == len(ids)
        assert tokens["both"] == len(ids) + len(result["output"])


def test_every_choice_has_its_prompts_roles(run: Run) -> None:
    """With `n=3` each choice is judged by the turns of the prompt that they share."""
    chats = [chat for chat in run.chats for _ in range(CHOICES)]
    told = {}
    for result, chat in zip(run.sampled, chats, strict=True):
        told[result["id"]] = run.check(result, chat)
    assert len(told) == len(chats)
    first = [frozenset(told[result["id"]]) for result in run.sampled]
    assert any(len(set(first[i : i + CHOICES])) > 1 for i in range(0, len(first), CHOICES))


@pytest.mark.parametrize("scope", CLAMPS)
def test_a_clamp_edits_the_turns_of_its_role(scope: str, run: Run) -> None:
    """And no other row: texts are those of Transformers with a hook on these rows alone."""
    changed = by_role = 0
    for i, chat in enumerate(run.chats[:CLAMPED]):
        expected = run.reference.generate(chat, scope)
        for result in run.clamped[scope][2 * i : 2 * i + 2]:
            assert result["output"] == expected, (scope, i)
            run.check(result, chat)
            event = run.events[result["id"]][f"clamp.{scope}"]
            assert event["mode"] == "enforce"
            assert (event["acted"] == "clamp") == (event["verdict"] == "match")
        changed += expected != run.plain[i]["output"][:TOKENS]
        everywhere = ("template", "system", "user", "assistant", "tool", "output", "continued")
        by_role += expected != run.reference.generate(chat, scope, everywhere)
    assert changed > 1, "the clamp must be seen to change texts"
    assert by_role > 1, "and to change them otherwise than one that looks everywhere"
