"""Attention sinks: left out alike by serving and by Transformers, counted, and never edited."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from saeguard.guard.watchlist import WatchList
from saeguard.hf.clamp import greedy
from saeguard.hf.model import LanguageModel, load_model
from saeguard.hf.scan import scan
from saeguard.hf.texts import Text
from saeguard.sae import inspect, read_rows
from tests import models
from tests.engine import engines

pytestmark = pytest.mark.engine

BOUND = 60.0
"""Between the norms of ordinary tokens and that of the first one."""
SINK = 300.0
TOKENS = 8
CLAMP = "test.clamp"
"""In shadow; the requests that have it enforced read no cached prefix."""
DRAFTS = {
    "speculative_config": {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 2,
        "prompt_lookup_min": 1,
    }
}


def make(root: Path) -> models.Guarded:
    """Make a GPT-2 whose position 0 is an attention sink, whichever token stands there.

    A policy over prompt and output reads and clamps the latents that fire most on it.
    """
    guarded = models.make_guarded(root, "gpt2", most=0.9)
    lm = load_model(guarded.model)
    first = lm.model.transformer.wpe.weight[0]
    with torch.no_grad():
        first *= SINK / first.norm()
    lm.model.save_pretrained(guarded.model)
    write_bound(guarded, BOUND)
    rows = read_rows(inspect(guarded.sae), guarded.latents)
    strongest = (rows.W @ first.detach() + rows.b).topk(2).indices.tolist()
    features = [f"f{guarded.latents[i]}" for i in strongest]
    models.write_policy(
        guarded.policies / "clamp.yaml", id=CLAMP, action="clamp", mode="shadow",
        detect={"a": {"feature": features[0], "above": 0.9}}, condition="a",
        clamp={"features": features, "when": "always", "to": 1.0},
    )  # fmt: skip
    return guarded


def write_bound(guarded: models.Guarded, bound: float | None) -> None:
    """Write the bound of the tapped layer into the feature set, or remove it."""
    path = guarded.feature_sets / "tiny.yaml"
    content = yaml.safe_load(path.read_text())
    content.pop("max_norm", None)
    path.write_text(yaml.safe_dump(content | ({"max_norm": {1: bound}} if bound else {})))


def prompts(count: int) -> list[list[int]]:
    """Return prompts without BOS that repeat, so that drafts are accepted, longer than a block."""
    drawn = engines.random_prompts(count, seed=4, shortest=6, longest=12)
    return [(prompt[1:] * 25)[: 140 + i] for i, prompt in enumerate(drawn)]


def enforced(watchlist: WatchList) -> WatchList:
    """Return the watch list with the clamp enforced for every request."""
    policies = tuple(replace(p, mode="enforce") if p.id == CLAMP else p for p in watchlist.policies)
    return replace(watchlist, policies=policies)


def check(
    root: Path, guarded: models.Guarded, texts: list[list[int]], **engine: Any
) -> tuple[WatchList, LanguageModel]:
    """Serve prompts twice, and clamped, and compare everything with Transformers."""
    how = {key: engine.pop(key) for key in ("v2", "triton") if key in engine}
    settings = guarded.settings(events=str(root / "events.jsonl"), request_may_enforce=[CLAMP])
    plain = engines.requests(texts, max_tokens=TOKENS)
    enforce = {"saeguard_enforce": CLAMP}
    served = engines.serve(
        root / "served",
        {
            "model": str(guarded.model),
            "max_num_seqs": 4,
            "additional_config": {"saeguard": settings},
            **engine,
        },
        [plain, plain, engines.requests(texts, max_tokens=TOKENS, extra_args=enforce)],
        **how,
    )
    watchlist, lm = engines.compile_policies(settings), load_model(guarded.model)
    assert "saeguard leaves out attention sinks" in served.log
    assert any(result["cached"] for result in served.results), "a recorded prefix must be recalled"
    events = engines.events_by_request(root / "events.jsonl")
    skips = [r["saeguard"]["coverage"]["skipped"] for r in served.results]
    read = [  # an accepted draft at a text's end was forwarded, other last tokens were not
        Text(r["id"], (*r["prompt"], *r["output"])[: -1 if "not_forwarded" in s else None],
             len(r["prompt"]))
        for r, s in zip(served.results, skips, strict=True)
    ]  # fmt: skip
    for i, verdicts in list(scan(lm, watchlist, read)):  # greedy runs the same model
        result = served.results[i]
        rules = watchlist if i < 2 * len(texts) else enforced(watchlist)
        assert result["output"] == greedy(lm, rules, result["prompt"], TOKENS), result["id"]
        assert skips[i]["massive_norm"] == 1
        assert skips[i].keys() <= {"massive_norm", "not_forwarded"}
        for verdict in verdicts:
            event = events[result["id"]][verdict.policy]
            found, expected = event["coverage"], verdict.coverage
            skipped = {k: n for k, n in found["skipped"].items() if k != "not_forwarded"}
            assert (skipped, found["evaluated"]) == (expected.skipped, expected.evaluated)
            assert found["evaluated"] + sum(found["skipped"].values()) == found["tokens"]
            assert event["verdict"] == verdict.outcome
            assert event["first_token"] == verdict.first_token
            assert event["matched_tokens"] == verdict.matched_tokens
            assert event["first_token"] != 0
    return watchlist, lm


def test_model_runner_v1(tmp_path: Path) -> None:
    """Drafts, chunks, a recorded prefix and a clamp on every row; compiled."""
    guarded, texts = make(tmp_path), prompts(6)
    watchlist, lm = check(tmp_path, guarded, texts, max_num_batched_tokens=64, **DRAFTS)

    hooks = tuple(replace(hook, max_norm=float("inf")) for hook in watchlist.hooks)
    blind = replace(watchlist, hooks=hooks)
    read = [Text(str(i), tuple(text), len(text)) for i, text in enumerate(texts)]
    fired = [any(v.first_token == 0 for v in verdicts) for _, verdicts in scan(lm, blind, read)]
    assert all(fired), "without the bound, each request is flagged at its first token"
    both = enforced(watchlist), enforced(blind)
    edited = [greedy(lm, both[0], t, TOKENS) != greedy(lm, both[1], t, TOKENS) for t in texts]
    assert any(edited), "an edited sink must show in the text"


def test_model_runner_v2(tmp_path: Path) -> None:
    """The same on the runner of GPUs, through Triton's interpreter."""
    check(tmp_path, make(tmp_path), prompts(2), v2=True, enforce_eager=True)


@pytest.mark.ranks
@pytest.mark.parametrize(
    "ranks",
    [
        {"tensor_parallel_size": 2, "enforce_eager": True},
        {"pipeline_parallel_size": 2},  # uncompiled, it fails by itself on a CPU
    ],
    ids=["tensor", "pipeline"],
)
def test_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: dict[str, Any]) -> None:
    """Norms travel between pipeline stages; each tensor-parallel rank leaves the same rows."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(map(str, cores)))
    check(tmp_path, make(tmp_path), prompts(4), **ranks)


def test_a_bound_that_leaves_out_everything_ends_the_start(tmp_path: Path) -> None:
    """A bound of another model would make a guard that is silent on every request."""
    guarded = make(tmp_path)
    write_bound(guarded, 0.001)
    done = engines.run(
        tmp_path / "refused",
        {
            "model": str(guarded.model),
            "enforce_eager": True,
            "additional_config": {"saeguard": guarded.settings()},
        },
        [],
    )
    assert done.returncode
    assert (
        "the norm of every token lies above the feature sets' max_norm" in done.stdout + done.stderr
    )


def test_a_set_without_a_bound_is_named(tmp_path: Path) -> None:
    """The server starts, warns, and evaluates the sink like any other token."""
    guarded = make(tmp_path)
    write_bound(guarded, None)
    served = engines.serve(
        tmp_path / "served",
        {
            "model": str(guarded.model),
            "enforce_eager": True,
            "additional_config": {"saeguard": guarded.settings()},
        },
        [engines.requests(prompts(1), max_tokens=2)],
    )
    assert "evaluates attention sinks like other tokens" in served.log
    assert served.results[0]["saeguard"]["coverage"]["skipped"] == {"not_forwarded": 1}
