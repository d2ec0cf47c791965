"""Prompts that hold embeddings: judged by their own content, whoever had the place before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml

from saeguard.guard.forward_pass import allocate_rows
from saeguard.guard.judge import judge_text
from saeguard.guard.watchlist import WatchList
from saeguard.vllm.worker.guard import WorkerGuard
from tests import models
from tests.engine import engines
from tests.engine.test_storm import MARGIN, Live, living
from tests.guard.watchlists import coded
from tests.tiny import chat_by_hand

pytestmark = pytest.mark.engine

EXCLUDED = [0, 1, 600]
"""0 is what vLLM keeps for a token that has no id, 1 is BOS, 600 lies outside the vocabulary."""
OUTSIDE = 9999
"""A token id outside the vocabulary."""
ROLES = ("user", "system")


class Content(NamedTuple):
    """What a prompt holds."""

    embeds: torch.Tensor
    """[tokens, hidden]; rows of tokens with an id do not matter."""
    is_token: np.ndarray
    roles: list[str]


class Embedded(Live):
    """An engine that takes embeddings, and the reference for what it then says."""

    def prepare(self, root: Path) -> dict[str, Any]:
        """Make random policies, and some on roles."""
        self.guarded = models.make_guarded(root, most=4.0)
        for role in ROLES:
            models.write_policy(
                self.guarded.policies / f"{role}.yaml", id=f"test.{role}", scope=role,
                detect={"a": {"feature": "f4", "above": 2.0}}, condition="a",
            )  # fmt: skip
        path = self.guarded.feature_sets / "tiny.yaml"
        features = yaml.safe_load(path.read_text())
        path.write_text(yaml.safe_dump({**features, "exclude_tokens": EXCLUDED}, sort_keys=False))
        self.reference = engines.Reference(self.guarded.model, self.guarded.sae)
        self.table = self.reference.model.get_input_embeddings().weight.detach()
        self.contents: dict[int, Content] = {}
        """By length of the prompt."""
        return self.guarded.settings(events=str(self.events))

    def request(self, step: int, content: Content, ids: list[int] | None = None) -> dict[str, Any]:
        """Return a request of embeddings; of tokens, too, if there are ids."""
        self.contents[len(content.embeds)] = content
        return {
            "step": step, "params": {**engines.GREEDY, "detokenize": False}, "ids": ids,
            "embeds": content.embeds.tolist(), "is_token": content.is_token.tolist(),
        }  # fmt: skip

    def check(self, ended: dict[str, Any], events: dict[str, Any]) -> None:
        """Hold one request against the reference, which reads the embeddings themselves."""
        tokens, prompt = np.array(ended["tokens"]), ended["prompt"]
        content = self.contents.get(prompt)
        embedded = np.zeros(len(tokens), bool)
        x = self.table[torch.from_numpy(tokens.clip(0, models.VOCABULARY - 1))].clone()
        roles = ["user"] * prompt
        if content is not None:
            embedded[:prompt] = ~content.is_token
            x[embedded] = content.embeds[embedded[:prompt]]
            roles = content.roles
        self.reference.model(inputs_embeds=x[None, :-1])
        latents = self.reference.sae.encode(self.reference._last[0][0]).detach().numpy()
        columns = [int(name.rsplit("/f", 1)[1]) for name in self.watchlist.features]
        shares = latents[:, columns].astype(np.float32)
        evaluable = (~np.isin(tokens, EXCLUDED) | embedded)[:-1]
        for verdict in judge_text(self.watchlist.rules, shares, evaluable, prompt, coded(roles)):
            event = events[verdict.policy]
            skipped = event["coverage"]["skipped"]
            assert event["coverage"]["evaluated"] == verdict.coverage.evaluated, (verdict, event)
            assert set(skipped) <= {"special_token", "not_forwarded"}
            if verdict.score is None or abs(verdict.score - 1) > MARGIN:
                assert (event["verdict"], event["first_token"]) == (
                    verdict.outcome, verdict.first_token
                ), (verdict, event)  # fmt: skip
                self.tally.verdicts += 1
                self.tally.seen[verdict.outcome] += 1


@pytest.fixture(
    scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["v1", "v2"]
)
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Embedded]:
    """Start an engine whose prompts are computed in chunks, of embeddings or not."""
    options = {
        "enable_prompt_embeds": True, "skip_tokenizer_init": False, "block_size": 32,
        "max_num_batched_tokens": 48, "num_gpu_blocks_override": 16,
    }  # fmt: skip
    with living(tmp_path_factory.mktemp("embedded"), options, Embedded, v2=request.param) as live:
        yield live


def plain(step: int, prompt: list[int]) -> dict[str, Any]:
    """Return a request of tokens."""
    return {"step": step, "prompt": prompt, "params": engines.GREEDY}


def test_whoever_came_before(engine: Embedded) -> None:
    """A prompt of embeddings is evaluated whole after prompts of BOS and of words.

    That is so for the embedding of BOS, too: a row without an id cannot be excluded by id.
    """
    rng = np.random.default_rng(1)
    for n, before in ((23, [1] * 40), (24, rng.integers(3, 256, 40).tolist())):
        words = [1, *rng.integers(3, 256, n - 2).tolist(), 1]
        rows = Content(engine.table[words], np.zeros(n, bool), ["user"] * n)
        for _ in range(4):  # as many places as a batch has
            engine.serve([plain(0, before)])
        engine.serve([engine.request(0, rows)])
    assert engine.tally.verdicts > 20


def test_among_others(engine: Embedded) -> None:
    """In chunks, beside others, and from the prefix cache; roles are those of the messages."""
    engine.contents.clear()
    rng = np.random.default_rng(2)
    mix, again = [], []
    for i in range(12):
        ids, roles = chat_by_hand([("system", "be kind " * (i + 1)), ("user", "look: " + "x" * i)])
        is_token = np.ones(len(ids), bool)
        inside = np.flatnonzero(np.array(roles) == ("user", "system")[i % 2])
        is_token[inside[-min(len(inside), 9) :]] = False
        random = torch.from_numpy(rng.normal(0, 0.12, (len(ids), models.HIDDEN))).float()
        # Whatever id stands for an embedding: of BOS, outside the vocabulary, a message's mark.
        sentinel = (1, OUTSIDE, -7, 2)[i % 4]
        mixed = [t if known else sentinel for t, known in zip(ids, is_token, strict=True)]
        rows = Content(random, is_token, roles)
        if len(ids) not in engine.contents:
            mix.append(engine.request(i // 2, rows, mixed))
            again.append({**mix[-1], "step": 0})
        mix.append(plain(i // 2, [1] * 20 + rng.integers(3, 256, 3 + i).tolist()))
    before = engine.tally.verdicts
    engine.serve(mix)
    engine.serve(again[-2:])
    engine.serve(again[-2:])
    assert engine.cached
    assert engine.tally.verdicts - before > 100
    assert engine.tally.seen["match"] > 10


def test_a_prompt_in_parts_is_refused(engine: Embedded) -> None:
    """A stop could not end such a request, and what a client adds to it would not be judged."""
    engine.ask("session")


def test_an_id_outside_the_vocabulary_is_no_excluded_token() -> None:
    """It raises nothing on the device, and does not count from the end of the table."""
    guard = WorkerGuard(
        watchlist=WatchList.__new__(WatchList),
        taps=(),
        rows=allocate_rows(8, torch.device("cpu")),
        eligible_ids=torch.tensor([True, False, True, False, True]),
        device=torch.device("cpu"),
    )
    ids = torch.tensor([1, 3, 4, 5, OUTSIDE, -1, -2, -4])
    guard.begin_pass(["a"], np.array([0, 8]), ids, torch.arange(8))
    assert [False, False, *[True] * 6] == guard.rows.eligible[:8].tolist()
