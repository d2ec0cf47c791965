"""What vLLM can do to a request, on one engine that reads every layer: each verdict is right.

Four feature sets on three layers, a clamp on the first, two LoRA adapters. The reference is
Transformers with hooks at every block, its weights merged with the adapter's, and SAELens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import models
from tests.engine import engines
from tests.engine.test_storm import Live, living

pytestmark = pytest.mark.engine

SETS = {"first": 0, "tiny": 1, "more/other": 1, "last": 2}
"""Feature sets, and the layer that each reads."""
LATENTS = tuple(range(0, 48, 4))
CLAMP = ("first", 12, 0.9, -6.0)
"""Feature set, latent that both triggers and is set, threshold, and what it is set to."""
TEXT = list(range(3, 259))
"""Tokens that the tokenizer knows."""


class Streams:
    """Transformers' residual streams at every block, with or without the clamp at one of them."""

    def __init__(self, model: Path, saes: dict[str, Path], adapter: Path | None = None) -> None:
        """Load the model and every SAE; merge the adapter into the model's weights."""
        from sae_lens import SAE
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        if adapter is not None:
            models.merge_adapter(self.model, adapter)
        self.saes: dict[str, Any] = {name: SAE.load_from_disk(str(s)) for name, s in saes.items()}
        self.clamped = False
        self._seen: dict[int, torch.Tensor] = {}
        for i, layer in enumerate(self.model.model.layers):
            layer.register_forward_hook(self._hook(i))

    def _hook(self, layer: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> Any:
            x = output[0] if isinstance(output, tuple) else output
            self._seen[layer] = x[0]
            if not self.clamped or layer != SETS[CLAMP[0]]:
                return None
            name, latent, above, to = CLAMP
            f = self.saes[name].encode(x[0])[:, latent]
            fired = torch.nonzero((f > above) & (torch.arange(len(f)) > 0))  # BOS is excluded
            if not len(fired):
                return None
            edited, first = x.clone(), int(fired[0])
            edited[0, first:] += (to - f[first:])[:, None] * self.saes[name].W_dec[latent]
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return hook

    @torch.no_grad()
    def shares(self, features: Sequence[str], tokens: list[int], *, clamped: bool) -> np.ndarray:
        """Return [tokens, features], in the order of a watch list's `set/f{latent}`."""
        self.clamped = clamped
        self.model(torch.tensor([tokens]))
        encoded = {name: sae.encode(self._seen[SETS[name]]) for name, sae in self.saes.items()}
        named = [name.rsplit("/f", 1) for name in features]
        columns = [encoded[name][:, int(latent)].numpy() for name, latent in named]
        return np.stack(columns, axis=1).astype(np.float32)


class Matrix(Live):
    """An engine that reads every layer, and the reference for it."""

    def prepare(self, root: Path) -> dict[str, Any]:
        """Make a model, two adapters, four feature sets with policies on each, and a clamp."""
        model = models.make_model("llama", root / "model")
        self.adapters = {
            name: models.make_adapter(root / name, model, seed)
            for seed, name in enumerate(("red", "blue"))
        }
        saes = {}
        for seed, (name, layer) in enumerate(SETS.items()):
            saes[name] = models.make_sae(root / "saes" / name, layer=layer, seed=seed)
            models.write_feature_set(
                root / "feature_sets" / f"{name}.yaml", saes[name], latents=LATENTS, name=name
            )
            short = name.rsplit("/", 1)[-1]
            models.random_policies(
                root / "policies" / short, LATENTS, seed, most=6.0, feature_set=name, prefix=short
            )
        name, latent, above, to = CLAMP
        models.write_policy(
            root / "policies" / "clamp.yaml", id="test.clamp", mode="shadow", action="clamp",
            feature_set=name, detect={"a": {"feature": f"f{latent}", "above": above}},
            condition="a", clamp={"features": [f"f{latent}"], "to": to},
        )  # fmt: skip
        self.guarded = models.Guarded(
            model, saes["tiny"], root / "policies", root / "feature_sets", LATENTS
        )
        self.streams: dict[str | None, Streams] = {
            adapter: Streams(model, saes, path)
            for adapter, path in [(None, None), *self.adapters.items()]
        }
        return self.guarded.settings(events=str(self.events), request_may_enforce=["test.clamp"])

    def shares(self, tokens: list[int], ended: dict[str, Any]) -> np.ndarray:
        """Return the reference's [tokens, features], under the request's adapter and clamp."""
        streams = self.streams[ended.get("adapter")]
        return streams.shares(self.watchlist.features, tokens, clamped=bool(ended["enforced"]))

    def adapter(self, name: str) -> tuple[str, int, str]:
        """Return what a request says to have an adapter."""
        return name, 1 + list(self.adapters).index(name), str(self.adapters[name])


@pytest.fixture(
    scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["v1", "v2"]
)
def matrix(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Matrix]:
    """Start the one engine, at night on both runners."""
    root = tmp_path_factory.mktemp("matrix")
    engine = {
        "skip_tokenizer_init": False, "block_size": 32, "max_model_len": 3072, "max_num_seqs": 12,
        # vLLM 0.32's CPU kernels give requests without adapter the last of the adapters' places,
        # guard or no guard; here it stays empty.
        "max_num_batched_tokens": 256, "enable_lora": True, "max_lora_rank": 8, "max_loras": 3,
    }  # fmt: skip
    with living(root, engine, Matrix, v2=request.param) as live:
        yield live


def mix_of(prompts: list[list[int]], **more: Any) -> list[dict[str, Any]]:
    """Return greedy requests that all come at once."""
    params = {**engines.GREEDY, **more.pop("params", {})}
    return [{"step": 0, "prompt": p, "params": params, **more} for p in prompts]


def one(said: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the only choice of each request, in the order they came."""
    return [choices[0] for _, choices in sorted(said.items(), key=lambda item: int(item[0]))]


def conclusions(end: dict[str, Any]) -> dict[str, Any]:
    """Return a response's verdicts, all but what float32 sums move by their order."""
    said = end["saeguard"]
    exact = ("policy", "action", "first_token", "matched_tokens", "coverage")
    return {**said, "verdicts": [{key: v[key] for key in exact} for v in said["verdicts"]]}


def test_every_layer_is_judged_at_its_own(matrix: Matrix) -> None:
    """Policies on the first, second and last layer, two feature sets on one, one clamp."""
    assert {hook.layer for hook in matrix.watchlist.hooks} == {0, 1, 2}
    before = matrix.tally.verdicts
    prompts = engines.random_prompts(12, seed=31)
    mix = mix_of(prompts)
    for request in mix[::3]:
        request["params"] = {
            **request["params"], "extra_args": {"saeguard_enforce": "test.clamp"}
        }  # fmt: skip
    clamped = one(matrix.serve(mix))
    plain = one(matrix.serve(mix_of(prompts)))
    assert matrix.tally.verdicts - before > 0.97 * 24 * len(matrix.watchlist.policies)
    changed = [a["tokens"] != b["tokens"] for a, b in zip(clamped, plain, strict=True)]
    assert sum(changed[::3]) > 1
    assert not any(changed[1::3] + changed[2::3])
    assert {v["policy"].split(".")[0] for c in plain for v in c["saeguard"]["verdicts"]} == {
        "first", "tiny", "other", "last"
    }  # fmt: skip


def test_beam_search(matrix: Matrix) -> None:
    """Policies on the output are enforced here, which would not see it: no request is made."""
    before = matrix.tally.requests
    prompts = engines.random_prompts(2, seed=32, shortest=60)
    answer = matrix.ask("beams", prompts=prompts, width=3, tokens=6)
    assert "beam search writes in steps of one token" in answer["said"]
    assert any(
        f"the policy {p.id} is enforced" in answer["said"] for p in matrix.watchlist.policies
    )
    assert matrix.tally.requests == before


def test_stop_strings_and_tokens(matrix: Matrix) -> None:
    """The client's text ends at the stop, and its verdict speaks of what was served to it."""
    prompts = engines.random_prompts(6, seed=33)
    inside = {"allowed_token_ids": TEXT, "max_tokens": 24}
    free = one(matrix.serve(mix_of(prompts, params=inside)))
    cut = [(end["tokens"][9], next(c for c in end["text"][5:] if c.isascii())) for end in free]
    by_token = [
        {**r, "params": {**r["params"], "stop_token_ids": [token]}}
        for r, (token, _) in zip(mix_of(prompts, params=inside), cut, strict=True)
    ]
    for end, (token, _) in zip(one(matrix.serve(by_token)), cut, strict=True):
        assert (end["why"], end["stop_reason"]) == ("stop", token)
        assert end["saeguard"]["coverage"]["skipped"]["not_forwarded"] == 1
    by_text = [
        {**r, "params": {**r["params"], "stop": [text]}}
        for r, (_, text) in zip(mix_of(prompts, params=inside), cut, strict=True)
    ]
    for prompt, end, (_, text) in zip(prompts, one(matrix.serve(by_text)), cut, strict=True):
        assert (end["why"], end["stop_reason"]) == ("stop", text)
        assert end["saeguard"]["coverage"]["tokens"] == len(prompt) + len(end["tokens"])
        assert set(end["saeguard"]["coverage"]["skipped"]) == {"not_forwarded", "special_token"}


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({"choice": ["yes", "certainly not"]}, "(yes|certainly not)"),
        ({"regex": "[ab]{3,6}-[0-9]{4}"}, "[ab]{3,6}-[0-9]{4}"),
        ({"json": {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],
                   "additionalProperties": False}},
         r'\{\s*"a"\s*:\s*[12]\s*\}'),
    ],
    ids=["choice", "regex", "json"],
)  # fmt: skip
def test_structured_output(matrix: Matrix, form: dict[str, Any], expected: str) -> None:
    """Masked sampling, beside requests that are free."""
    prompts = engines.random_prompts(6, seed=34, vocabulary=259)  # what can be decoded
    guided = {"structured_outputs": form, "max_tokens": 60, "ignore_eos": False}
    mix = [*mix_of(prompts[:3], params=guided), *mix_of(prompts[3:])]
    ends = one(matrix.serve(mix))[:3]
    # White space is free in JSON, and a random model can be fond of it until its tokens run out.
    # A prompt of random bytes can end within a character, which is decoded with the answer.
    whole = [end["text"] for end in ends if end["why"] == "stop"]
    assert whole
    assert [t for t in whole if not re.search(f"{expected}$", t)] == []
    cut = [end["text"] for end in ends if end["why"] != "stop"]
    assert [t for t in cut if "json" not in form or not re.search(r'\{[\s"a:12]*$', t)] == []


def test_very_long_prompts(matrix: Matrix) -> None:
    """Thousands of tokens in a dozen chunks, then from the prefix cache, with the same verdicts."""
    prompts = engines.random_prompts(2, seed=35, shortest=2800, longest=3000)
    first, again = (one(matrix.serve(mix_of(prompts))) for _ in range(2))
    for computed, cached in zip(first, again, strict=True):
        assert (computed["cached"], cached["cached"] > 2700) == (0, True)
        assert conclusions(cached) == conclusions(computed)
        assert cached["tokens"] == computed["tokens"]


def test_requests_that_ask_for_no_more_than_their_prompt(matrix: Matrix) -> None:
    """One token is the least that vLLM samples; it is the one that nothing reads."""
    prompts = engines.random_prompts(6, seed=36)
    for end in one(matrix.serve(mix_of(prompts, params={"max_tokens": 1}))):
        skipped = end["saeguard"]["coverage"]["skipped"]
        assert skipped == {"special_token": 1, "not_forwarded": 1}


def test_requests_that_end_in_error(matrix: Matrix) -> None:
    """Within the scheduler's update; no policy stops here, so that passes wait to be judged."""
    mix = mix_of(engines.random_prompts(6, seed=40))
    ended = matrix.ask("mix", mix=mix, between={"2": "fail", "7": "fail"})["ended"].values()
    assert sorted(e["why"] for e in ended) == ["error"] * 2 + ["length"] * 4


def test_adapters(matrix: Matrix) -> None:
    """Verdicts are the adapted model's, in one batch with others' and for the same prompts."""
    prompts = engines.random_prompts(4, seed=37, shortest=70)
    mix = [
        request
        for prompt in prompts
        for adapter in (None, matrix.adapter("red"), matrix.adapter("blue"))
        for request in mix_of([prompt], adapter=adapter)
    ]
    first, again = (one(matrix.serve(mix)) for _ in range(2))
    for computed, cached in zip(first, again, strict=True):
        assert (computed["cached"], cached["cached"] >= 64) == (0, True)
        assert conclusions(cached) == conclusions(computed)
    scores = [tuple(v["score"] for v in end["saeguard"]["verdicts"]) for end in first]
    assert len(set(scores)) == len(mix), "an adapter must move the scores to prove anything"


@pytest.mark.parametrize("what", ["reset", "sleep"])
def test_the_cache_is_dropped(matrix: Matrix, what: str) -> None:
    """By a reset or a sleep, with requests under way; what was remembered goes with it."""
    prompts = engines.random_prompts(8, seed=38, shortest=70)
    matrix.serve(mix_of(prompts))
    assert matrix.ask(what)["memory"] == 0
    for end in one(matrix.serve(mix_of(prompts))):
        assert end["cached"] == 0
    mix = mix_of(prompts, params={"max_tokens": 30})
    cut = matrix.ask("mix", mix=mix, between={"2": what, "9": what, "20": what})
    assert all(ended["preempted"] for ended in cut["ended"].values())
    plain = one(matrix.serve(mix))
    assert [e["tokens"] for e in one(cut["said"])] == [e["tokens"] for e in plain]
    assert [conclusions(e) for e in one(cut["said"])] == [conclusions(e) for e in plain]
