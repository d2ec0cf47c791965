"""First-order effects of latents, against the effects themselves; draws of random latents."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saeguard.effect.attribute import (
    Scored,
    attribute,
    candidates,
    log_probabilities,
    try_edit,
)
from saeguard.effect.random_latents import Usual, draw, scale_to_norm
from saeguard.hf.model import LanguageModel, load_model
from saeguard.sae import SaeInfo, inspect, read_decoder_rows
from tests import models

LATENTS = 48
EXCLUDED = (0, 1, 2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[LanguageModel, SaeInfo, list[Scored]]:
    """A small random model, an SAE on its middle layer, and pairs of completions."""
    root = tmp_path_factory.mktemp("attribute")
    lm = load_model(models.make_model("llama", root / "model"))
    info = inspect(models.make_sae(root / "sae", d_sae=LATENTS))
    rng = np.random.default_rng(0)
    texts = []
    for pair in range(6):
        prompt = rng.integers(3, 250, 6 + pair).tolist()
        for label in (0, 1):
            answer = rng.integers(3, 250, 4 + label).tolist()
            tokens = (1, *prompt, *answer)
            texts.append(Scored(tokens, 1 + len(prompt), label, f"q{pair}", f"t{pair // 2}"))
    return lm, info, texts


def test_a_small_edit_has_the_estimated_effect(
    made: tuple[LanguageModel, SaeInfo, list[Scored]],
) -> None:
    """The gradient times a small step is what the step does, template by template."""
    lm, info, texts = made
    found = attribute(lm, info, texts, EXCLUDED, lambda _count: None)
    plain = log_probabilities(lm, texts, info.layer)
    latent = int(np.argmax(found.rate * (found.rate < 1)))
    row = read_decoder_rows(info, [latent])[0]
    step = 0.01
    edited = log_probabilities(lm, texts, info.layer, lambda x: x + step * row, EXCLUDED)
    gain = ((edited - plain) / step).reshape(3, 2, 2)  # templates, questions, labels
    per_unit = (gain[..., 1] - gain[..., 0]).mean(1)
    # Raising to the height adds it at every token; what is subtracted there, ablation does alone.
    estimate = found.raise_[:, latent] - found.ablate[:, latent]
    assert estimate == pytest.approx(found.height[latent] * per_unit, rel=0.05, abs=1e-4)


def test_the_best_candidates_lower_the_preference(
    made: tuple[LanguageModel, SaeInfo, list[Scored]],
) -> None:
    """Each is an estimate below 0, and an edit that can be made."""
    lm, info, texts = made
    found = attribute(lm, info, texts, EXCLUDED, lambda _count: None)
    plain = log_probabilities(lm, texts, info.layer)
    chosen = candidates(found, 3)
    assert chosen
    assert all(c.predicted < 0 and c.z < -2 for c in chosen)
    target = {chosen[0].latent: 0.0 if chosen[0].how == "ablate" else chosen[0].height}
    effect = try_edit(lm, info, texts, target, EXCLUDED, plain)
    assert effect.change.shape == (3,)
    assert np.isfinite(effect.change).all()


def test_excluded_tokens_are_not_edited(
    made: tuple[LanguageModel, SaeInfo, list[Scored]],
) -> None:
    """With every token excluded, an edit changes nothing."""
    lm, info, texts = made
    plain = log_probabilities(lm, texts, info.layer)
    effect = try_edit(lm, info, texts, {0: 50.0}, range(512), plain)
    assert np.abs(effect.change).max() == 0.0
    assert try_edit(lm, info, texts, {0: 50.0}, EXCLUDED, plain).loss != 0.0


def test_a_control_fires_as_often_and_is_as_strong() -> None:
    """Stand-ins are near in rate, are not taken, and their edit has the norm of the clamp."""
    rng = np.random.default_rng(0)
    usual = Usual(np.exp(rng.uniform(-7, -1, 2000)), rng.uniform(1, 3, 2000), np.ones(2000))
    taken = set(range(500))
    for _ in range(20):
        drawn = draw(usual, [3, 900], taken, rng)
        assert len({*drawn, 3, 900}) == 4
        assert not taken & set(drawn)
        assert np.abs(np.log(usual.rate[list(drawn)] / usual.rate[[3, 900]])).max() < np.log(3)
    W_dec = torch.nn.functional.normalize(torch.randn(2, 16), dim=1)
    f = torch.rand(100, 2) * (torch.rand(100, 2) < 0.2)
    targets = scale_to_norm(usual, drawn, f, W_dec, 7.5)
    edit = (torch.tensor(list(targets.values())) - f) @ W_dec
    assert float(edit.norm(dim=1).mean()) == pytest.approx(7.5, rel=1e-4)
    with pytest.raises(ValueError, match="latents fire"):
        draw(Usual(np.zeros(9), np.zeros(9), np.ones(9)), [1], set(), rng)
