"""SAEs of other kinds than JumpReLU, served: what is seen is what their own libraries compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from saeguard.features.load import load_feature_set, save_feature_set
from saeguard.features.topk_thresholds import Approximation, Rate, StandIn
from tests import models
from tests.engine import engines

pytestmark = pytest.mark.engine
sparsify = pytest.importorskip("sparsify")

KINDS = {
    "topk": {"kind": "topk", "k": 24},
    "gated": {"kind": "gated", "normalize_activations": "layer_norm"},
    "scaled": {"kind": "jumprelu", "normalize_activations": "constant_norm_rescale"},
}
RANKED = {"topk", "sparsify"}
ABOVE = 0.3
STAND_IN = 3.0
"""The threshold that stands for the ranks of `rough`, which is `topk` read approximately."""


class Encoder:
    """What an SAE's own library makes of residuals [tokens, d_in]."""

    def __init__(
        self, encode: Callable[[torch.Tensor], torch.Tensor], pre: Callable[..., torch.Tensor]
    ) -> None:
        """Take its activations, and its pre-activations."""
        self.encode, self.pre = encode, pre


def _by_saelens(folder: Path) -> Encoder:
    from sae_lens import SAE

    sae = SAE.load_from_disk(str(folder))
    return Encoder(sae.encode, lambda x: (x - sae.b_dec) @ sae.W_enc + sae.b_enc)


def _by_sparsify(folder: Path) -> Encoder:
    """Write a TopK checkpoint with sparsify, and return what it encodes once loaded again."""
    config = sparsify.SparseCoderConfig(activation="topk", expansion_factor=4, k=24)
    made = sparsify.SparseCoder(models.HIDDEN, config)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.3 if parameter.dim() > 1 else 0.1)
    made.save_to_disk(folder)
    coder = sparsify.SparseCoder.load_from_disk(folder)

    def encode(x: torch.Tensor) -> torch.Tensor:
        out = coder.encode(x)
        return torch.zeros(len(x), coder.num_latents).scatter(-1, out.top_indices, out.top_acts)

    weight, bias = coder.encoder.weight, coder.encoder.bias
    return Encoder(encode, lambda x: (x - coder.b_dec) @ weight.T + bias)


def _rough(root: Path, latents: tuple[int, ...]) -> None:
    """Write `rough`: the feature set `topk`, its ranks approximated by one threshold."""
    features = load_feature_set(root / "feature_sets" / "topk.yaml")
    rate = Rate(0.9, (0.8, 0.95), 90, 100)
    stand_ins = dict.fromkeys(latents, StandIn(STAND_IN, rate, rate))
    assert features.sae.sha256 is not None
    found = Approximation(24, features.sae.sha256, "0" * 64, 10, 1000, stand_ins)
    rough = replace(features, id="rough", sae=replace(features.sae, approximation=found))
    save_feature_set(rough, root / "feature_sets" / "rough.yaml")


def test_kinds_side_by_side(tmp_path: Path) -> None:
    """SAEs of SAELens and sparsify on one layer, in one tap: activations and verdicts hold.

    A TopK latent may show as silent where it lies below every policy's threshold; above, its rank
    decides, and it must be the library's decision. Where ranks are approximated, the threshold
    decides, and each event says so.
    """
    model = models.make_model("llama", tmp_path / "model", 0)
    latents = tuple(range(0, 256, 4))
    encoders = {"sparsify": _by_sparsify(tmp_path / "sparsify" / "layers.1")}
    for seed, (name, options) in enumerate(KINDS.items()):
        encoders[name] = _by_saelens(models.make_sae(tmp_path / name, seed=seed, **options))
    for name in encoders:
        sae = tmp_path / name / "layers.1" if name == "sparsify" else tmp_path / name
        models.write_feature_set(
            tmp_path / "feature_sets" / f"{name}.yaml", sae, latents=latents, high=8.0
        )
    _rough(tmp_path, latents)
    pre = encoders["topk"].pre
    encoders["rough"] = Encoder(lambda x: pre(x) * (pre(x) > STAND_IN), pre)
    for name in encoders:
        for latent in latents:
            models.write_policy(
                tmp_path / "policies" / f"{name}.p{latent}.yaml",
                feature_set=name,
                detect={"a": {"feature": f"f{latent}", "above": ABOVE}},
                condition="a",
            )
    settings = {
        "policies": str(tmp_path / "policies"),
        "feature_sets": str(tmp_path / "feature_sets"),
        "events": str(tmp_path / "events.jsonl"),
        "event_lines": "all",
    }
    served = engines.serve(
        tmp_path / "served",
        {
            "model": str(model),
            "enforce_eager": True,
            "additional_config": {"saeguard": settings},
        },
        [engines.requests(engines.random_prompts(6, seed=1))],
    )
    assert served.log.count("ranks latents exactly") >= len(RANKED)
    assert "reads TopK latents by thresholds, not by rank" in served.log
    watchlist = engines.compile_policies(settings)
    events = engines.events_by_request(tmp_path / "events.jsonl")
    lm = engines.Reference(model, tmp_path / "topk").model
    outranked, matched = dict.fromkeys(encoders, 0), dict.fromkeys(encoders, 0)
    for name, encoder in encoders.items():
        features = [watchlist.features.index(f"{name}/f{latent}") for latent in latents]
        columns = [watchlist.latents(feature)[0][0] for feature in features]
        for result in served.results:
            positions, f = served.activations[result["id"]]
            tokens = [*result["prompt"], *result["output"]][:-1]
            assert positions.tolist() == list(range(len(tokens)))
            screen = {"rough": STAND_IN}.get(name, ABOVE * 8.0 if name in RANKED else 0.0)
            with torch.no_grad():
                x = lm(torch.tensor([tokens]), output_hidden_states=True).hidden_states[2][0]
                full = encoder.encode(x).numpy()
                high = encoder.pre(x).numpy() > screen if name in RANKED else full > screen
            expected, got = full[:, latents], f[:, columns]
            close = 2e-4 * full.max()
            shown = got > 0
            np.testing.assert_allclose(got[shown], expected[shown], rtol=0, atol=close)
            assert (expected[~shown] <= screen + close).all()
            outranked[name] += int((high[:, latents] & (expected == 0)).sum())
            for latent, column in zip(latents, expected[1:].T, strict=True):
                if np.abs(column - ABOVE * 8.0).min() > close:  # BOS is not looked at
                    event = events[result["id"]][f"{name}.p{latent}"]
                    assert event["matched_tokens"] == (column > ABOVE * 8.0).sum()
                    assert event["approximate"] == (name == "rough")
                    matched[name] += event["matched_tokens"]
    print(f"outranked {outranked}, matched {matched}")
    assert all(outranked[name] > 50 for name in RANKED), "ranks must have mattered"
    assert all(count > 100 for count in matched.values())
