"""A clamp edits the rows it should, as Transformers with a hook would, and nobody else's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import models
from tests.engine import engines

pytestmark = pytest.mark.engine

ABOVE, TO, COUNT = 0.9, -6.0, 24


class ClampedReference(engines.Reference):
    """Transformers with a plain forward hook that clamps; the whole text again at every step."""

    def __init__(
        self, guarded: models.Guarded, detect: int, clamp: int, window: tuple[int, int]
    ) -> None:
        """Watch latent `detect`; from its first match on, set latent `clamp` to `TO`."""
        super().__init__(guarded.model, guarded.sae)
        self.detect, self.clamp, self.window, self.scope_from = detect, clamp, window, 0
        engines.blocks(self.model)[self.layer].register_forward_hook(self._edit)

    def _edit(self, _module: Any, _args: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        f = self.sae.encode(x[0])
        k, n = self.window
        fired = [
            bool(f[t, self.detect] > ABOVE) and t >= self.scope_from and t > 0
            for t in range(len(f))
        ]
        first = next((t for t in range(len(f)) if sum(fired[max(0, t - n + 1) : t + 1]) >= k), None)
        if first is not None:
            delta = (TO - f[first:, self.clamp])[:, None] * self.sae.W_dec[self.clamp]
            x = x.clone()
            x[0, first:] += delta
        return (x, *output[1:]) if isinstance(output, tuple) else x

    @torch.no_grad()
    def generate(self, prompt: list[int], tokens: int, *, output_only: bool) -> list[int]:
        """Continue greedily."""
        self.scope_from = len(prompt) if output_only else 0
        text = list(prompt)
        for _ in range(tokens):
            text.append(int(self.model(torch.tensor([text])).logits[0, -1].argmax()))
        return text[len(prompt) :]


def guarded_with_clamps(root: Path, family: str) -> models.Guarded:
    """Make a model with two shadow clamps that requests may have enforced."""
    model = models.make_model(family, root / "model")
    sae = models.make_sae(root / "sae")
    models.write_feature_set(root / "feature_sets" / "tiny.yaml", sae, latents=(4, 8))
    for name, scope, window in (("both", "both", "1 of 1"), ("output", "output", "2 of 4")):
        models.write_policy(
            root / "policies" / f"{name}.yaml",
            id=f"clamp.{name}",
            mode="shadow",
            action="clamp",
            scope=scope,
            detect={"a": {"feature": "f4" if name == "both" else "f8", "above": ABOVE}},
            condition="a",
            **{"for": f"{window} tokens"},
            clamp={"features": ["f8" if name == "both" else "f4"], "to": TO},
        )
    return models.Guarded(model, sae, root / "policies", root / "feature_sets", (4, 8))


def serve_mixed(
    root: Path, *, v2: bool, count: int, longest: int, tokens: int, family: str = "llama"
) -> tuple[Any, Any]:
    """Make a model with clamps and serve a mixed batch three times."""
    guarded = guarded_with_clamps(root, family)
    return guarded, serve_thrice(
        root, guarded, v2=v2, count=count, longest=longest, tokens=tokens, enforce_eager=v2
    )


def mixed_settings(root: Path, guarded: models.Guarded) -> dict[str, Any]:
    """Return the settings under which requests may have themselves clamped."""
    return guarded.settings(
        events=str(root / "events.jsonl"), request_may_enforce=["clamp.both", "clamp.output"]
    )


def enforced(i: int, count: int) -> str | None:
    """Return what is enforced for request `i`: each prompt comes, otherwise, and as at first."""
    return (None, "clamp.both", "clamp.output")[(i % count + 2 * (i // count == 1)) % 3]


def serve_thrice(
    root: Path,
    guarded: models.Guarded,
    *,
    v2: bool = False,
    count: int,
    longest: int,
    tokens: int,
    **engine: Any,
) -> engines.Served:
    """Serve a batch of prompts in small chunks, two of three clamped, and twice again."""
    prompts = engines.random_prompts(count, seed=11, longest=longest)
    batch = engines.requests(3 * prompts, max_tokens=tokens)
    for i, request in enumerate(batch):
        name = enforced(i, count)
        if name is not None:
            request["params"] = {**request["params"], "extra_args": {"saeguard_enforce": name}}
    return engines.serve(
        root / "run",
        {
            "model": str(guarded.model),
            "max_num_seqs": 6,
            "max_num_batched_tokens": 32,  # prompts are cut into chunks and mixed with decoding
            "max_model_len": 128,
            "block_size": 32,  # prompts are longer, so that the cache can hold them
            "enable_chunked_prefill": True,
            "additional_config": {"saeguard": mixed_settings(root, guarded)},
            **engine,
        },
        [batch[n : n + count] for n in range(0, len(batch), count)],
        v2=v2,
    )


def check(guarded: models.Guarded, served: engines.Served, count: int, tokens: int) -> None:
    """Compare every text with the reference under its own clamp."""
    plain = engines.Reference(guarded.model, guarded.sae)
    plain_generate = ClampedReference.generate
    both = ClampedReference(guarded, 4, 8, (1, 1))
    output = ClampedReference(guarded, 8, 4, (2, 4))
    changed = 0
    for i, result in enumerate(served.results):
        kind = enforced(i, count)
        free = plain_generate(plain, result["prompt"], tokens, output_only=False)  # type: ignore[arg-type]
        if kind is None:
            assert result["output"] == free, i
            continue
        reference = both if kind == "clamp.both" else output
        expected = reference.generate(result["prompt"], tokens, output_only=reference is output)
        assert result["output"] == expected, (i, kind, result["output"], expected, free)
        changed += expected != free
    assert changed > count / 6, "the clamp must be seen to change texts"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, models.Guarded, engines.Served]:
    """Serve one mixed batch three times."""
    root = tmp_path_factory.mktemp("clamp")
    return root, *serve_mixed(root, v2=False, count=COUNT, longest=70, tokens=16)


def test_clamped_texts_equal_the_reference(
    mixed: tuple[Path, models.Guarded, engines.Served],
) -> None:
    """Chunked, batched with unclamped requests, and read again from a cache that others filled."""
    _, guarded, served = mixed
    check(guarded, served, COUNT, 16)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt_neox", "stablelm"])
def test_clamps_on_other_forms_of_output(family: str, tmp_path: Path) -> None:
    """A tensor with a batch dimension, and two values of which one is a left-over."""
    guarded, served = serve_mixed(
        tmp_path, v2=False, count=COUNT, longest=70, tokens=16, family=family
    )
    check(guarded, served, COUNT, 16)


def test_clamps_on_model_runner_v2(tmp_path: Path) -> None:
    """The same on Model Runner V2, smaller."""
    guarded, served = serve_mixed(tmp_path, v2=True, count=6, longest=40, tokens=6)
    check(guarded, served, 6, 6)


def test_a_clamp_is_told(mixed: tuple[Path, models.Guarded, engines.Served]) -> None:
    """Responses and events of clamped requests say so; nobody else's do."""
    root, _, served = mixed
    events = engines.events_by_request(root / "events.jsonl")
    acted = 0
    for i, result in enumerate(served.results):
        said = result["saeguard"]
        wanted = enforced(i, COUNT)
        assert {v["policy"] for v in said["verdicts"]} <= ({wanted} - {None})
        for name, event in events[result["id"]].items():
            assert event["mode"] == ("enforce" if name == wanted else "shadow")
            assert (event["acted"] == "clamp") == (name == wanted and event["verdict"] == "match")
            acted += event["acted"] == "clamp"
    assert acted > 3
