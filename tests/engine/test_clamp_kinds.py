"""Every way to clamp, and every way to say when, as Transformers with a plain hook would."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import models
from tests.engine import engines

pytestmark = pytest.mark.engine

DETECT, ABOVE, COUNT, TOKENS = 4, 0.5, 24, 14
LATENTS = (4, 8, 12, 16, 20, 24, 28, 32)


@dataclass(frozen=True)
class Kind:
    """One way to clamp: what the policy says, and what it means, one token at a time."""

    says: Mapping[str, Any]
    clamp: Mapping[str, Any]
    edit: Callable[[float], float]
    """From an activation to what it becomes."""
    on: Callable[[list[float], int], bool]
    """Whether token `t` is edited, by the detected latent's activations, 0 at BOS."""
    over: str | None = None


def fired(f: list[float], t: int) -> bool:
    """Return whether the selection holds at a token."""
    return f[t] > ABOVE


def mean_of_4(f: list[float], t: int) -> float:
    """Return the mean of the last four."""
    return sum(f[max(0, t - 3) : t + 1]) / 4


def average(f: list[float], t: int) -> float:
    """Return the average with half-life 2."""
    d, y = 0.5**0.5, 0.0
    for x in f[: t + 1]:
        y = d * y + (1 - d) * x
    return y


KINDS = {
    "activation": Kind(
        {}, {"activation": -6.0}, lambda _: -6.0, lambda f, t: max(f[: t + 1]) > ABOVE
    ),
    "scale": Kind(
        {"keep": 2},
        {"scale": -10.0, "when": "matched"},
        lambda x: -10 * x,
        lambda f, t: any(fired(f, u) for u in range(max(0, t - 2), t + 1)),
    ),
    "ablate": Kind({}, {"ablate": True, "when": "always"}, lambda _: 0.0, lambda _, t: t > 0),
    "at-most": Kind(
        {}, {"at_most": -5.0, "when": "always"}, lambda x: min(x, -5.0), lambda _, t: t > 0
    ),
    "mean": Kind(
        {},
        {"to": -6.0},
        lambda _: -6.0,
        lambda f, t: any(mean_of_4(f, u) > ABOVE for u in range(t + 1)),
        "mean of 4 tokens",
    ),
    "average": Kind(
        {},
        {"to": -6.0, "when": "matched"},
        lambda _: -6.0,
        lambda f, t: average(f, t) > ABOVE,
        "average with half-life 2 tokens",
    ),
    "count": Kind(
        {"for": "3 tokens in the request"},
        {"to": -6.0},
        lambda _: -6.0,
        lambda f, t: sum(fired(f, u) for u in range(t + 1)) >= 3,
    ),
}


class ClampedReference(engines.Reference):
    """Transformers with a plain forward hook; the whole text again at every step."""

    def __init__(self, guarded: models.Guarded) -> None:
        """Edit nothing until told to."""
        super().__init__(guarded.model, guarded.sae)
        self.kind: Kind | None = None
        self.latent = 0
        self.model.base_model.layers[self.layer].register_forward_hook(self._edit)

    def _edit(self, _module: Any, _args: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        if self.kind is None:
            return output
        f = self.sae.encode(x[0])
        detected = [0.0, *f[1:, DETECT].tolist()]
        x = x.clone()
        for t in range(len(f)):
            if self.kind.on(detected, t):
                now = float(f[t, self.latent])
                x[0, t] += (self.kind.edit(now) - now) * self.sae.W_dec[self.latent]
        return (x, *output[1:]) if isinstance(output, tuple) else x

    @torch.no_grad()
    def generate(self, prompt: list[int], kind: Kind | None, latent: int) -> list[int]:
        """Continue greedily under a clamp."""
        self.kind, self.latent = kind, latent
        text = list(prompt)
        for _ in range(TOKENS):
            text.append(int(self.model(torch.tensor([text])).logits[0, -1].argmax()))
        return text[len(prompt) :]


def guarded_with_clamps(root: Path) -> models.Guarded:
    """Make a model with a shadow clamp of each kind, each on a latent of its own."""
    model = models.make_model("llama", root / "model")
    sae = models.make_sae(root / "sae")
    models.write_feature_set(root / "feature_sets" / "tiny.yaml", sae, latents=LATENTS)
    for (name, kind), latent in zip(KINDS.items(), LATENTS[1:], strict=True):
        selection: dict[str, Any] = {"feature": f"f{DETECT}", "above": ABOVE}
        models.write_policy(
            root / "policies" / f"{name}.yaml",
            id=f"clamp.{name}",
            mode="shadow",
            action="clamp",
            detect={"a": selection | ({"over": kind.over} if kind.over else {})},
            condition="a",
            clamp={"features": [f"f{latent}"], **kind.clamp},
            **kind.says,
        )
    return models.Guarded(model, sae, root / "policies", root / "feature_sets", LATENTS)


def test_every_kind_as_the_reference(tmp_path: Path) -> None:
    """One batch in which requests have different clamps enforced, chunked and mixed."""
    guarded = guarded_with_clamps(tmp_path)
    prompts = engines.random_prompts(COUNT, seed=5, longest=60)
    names = [None, *KINDS]
    batch = engines.requests(prompts, max_tokens=TOKENS)
    for i, request in enumerate(batch):
        name = names[i % len(names)]
        if name is not None:
            extra = {"saeguard_enforce": f"clamp.{name}"}
            request["params"] = {**request["params"], "extra_args": extra}
    served = engines.serve(
        tmp_path / "run",
        {
            "model": str(guarded.model),
            "max_num_seqs": 6,
            "max_num_batched_tokens": 32,
            "max_model_len": 128,
            "enable_chunked_prefill": True,
            "enforce_eager": True,
            "additional_config": {
                "saeguard": guarded.settings(request_may_enforce=[f"clamp.{n}" for n in KINDS])
            },
        },
        [batch],
    )
    reference = ClampedReference(guarded)
    changed = set()
    for i, result in enumerate(served.results):
        name = names[i % len(names)]
        kind = None if name is None else KINDS[name]
        latent = LATENTS[i % len(names)]
        expected = reference.generate(result["prompt"], kind, latent)
        assert result["output"] == expected, (i, name)
        if expected != reference.generate(result["prompt"], None, latent):
            changed.add(name)
            acted = {v["policy"] for v in result["saeguard"]["verdicts"]}
            assert acted == {f"clamp.{name}"} or name in ("ablate", "at-most")
    assert changed >= set(KINDS) - {"ablate", "scale"}, "the clamps must be seen to change texts"
