"""Attribution and ablation on one prompt, against plain computations with hooks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from saeguard.effect.on_logits import Target, ablate, attribute_prompt, correlation
from saeguard.hf.model import LanguageModel, load_model
from saeguard.hf.on_prompt import OnPrompt, on_prompt
from saeguard.hf.texts import make_text
from saeguard.sae import SaeInfo, activate, inspect, read_block, read_decoder_rows
from tests import models

TARGET = Target(70, 80)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[LanguageModel, SaeInfo, OnPrompt]:
    """A small random model, an SAE on its middle layer, and a prompt."""
    root = tmp_path_factory.mktemp("on_logits")
    lm = load_model(models.make_model("llama", root / "model"))
    for parameter in lm.model.parameters():
        parameter.requires_grad_(False)
    info = inspect(models.make_sae(root / "sae", d_sae=96))
    return lm, info, on_prompt(lm, info, None, make_text("t", lm.tokenizer, "", "hello there"))


def by_hooks(
    lm: LanguageModel, info: SaeInfo, prompt: OnPrompt, f: torch.Tensor, target: Target
) -> torch.Tensor:
    """Return the metric with activations `f` [tokens, latents] written back into the residual.

    The residual is the SAE's reconstruction from `f` plus its error on the prompt as it is, so that
    a gradient with respect to `f` is what an edit of each latent does.
    """
    W_dec = read_decoder_rows(info, range(info.d_sae))
    own = plain_activations(info, prompt)
    error = prompt.x - own @ W_dec

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        x = (error + f @ W_dec)[None]
        return (x, *output[1:]) if isinstance(output, tuple) else x

    handle = lm.model.model.layers[info.layer].register_forward_hook(hook)
    try:
        logits = lm.model(torch.tensor([prompt.text.tokens])).logits[0, -1]
    finally:
        handle.remove()
    if target.against is None:
        return logits.log_softmax(-1)[target.token]
    return logits[target.token] - logits[target.against]


def plain_activations(info: SaeInfo, prompt: OnPrompt) -> torch.Tensor:
    """Return all activations [tokens, latents], zero at tokens that are not looked at."""
    f = activate(read_block(info, 0, info.d_sae), prompt.x)
    f[torch.from_numpy(~prompt.looked)] = 0
    return f


def dense(info: SaeInfo, prompt: OnPrompt, entries: np.ndarray) -> torch.Tensor:
    """Return entries as an array [tokens, latents]."""
    out = torch.zeros(len(prompt.pieces), info.d_sae)
    out[prompt.token, prompt.latent] = torch.from_numpy(entries).float()
    return out


@pytest.mark.parametrize("target", [TARGET, Target(70)], ids=["difference", "log-probability"])
def test_attribution_equals_gradient_times_activation_by_hooks(
    made: tuple[LanguageModel, SaeInfo, OnPrompt], target: Target
) -> None:
    """Of every latent at every token, by autograd through the reconstruction."""
    lm, info, prompt = made
    f = plain_activations(info, prompt).requires_grad_()
    metric = by_hooks(lm, info, prompt, f, target)
    (gradient,) = torch.autograd.grad(metric, [f])
    found = attribute_prompt(lm, info, prompt, target)
    assert found.metric == pytest.approx(float(metric.detach()), abs=1e-4)
    assert len(found.effect) > 100
    expected = (f * gradient).detach()
    assert torch.allclose(dense(info, prompt, found.effect), expected, atol=1e-5, rtol=1e-3)
    totals = found.by_latent()
    assert totals[int(prompt.latent[0])] == pytest.approx(
        float(expected[:, int(prompt.latent[0])].sum()), abs=1e-4
    )


def test_integrated_gradients_equal_the_mean_by_hooks_and_add_up(
    made: tuple[LanguageModel, SaeInfo, OnPrompt],
) -> None:
    """The mean gradient on the way from no latent; all effects add up to the whole difference."""
    lm, info, prompt = made
    own = plain_activations(info, prompt)
    total = torch.zeros_like(own)
    for k in range(5):
        f = (own * (k + 0.5) / 5).requires_grad_()
        (gradient,) = torch.autograd.grad(by_hooks(lm, info, prompt, f, TARGET), [f])
        total += gradient / 5
    found = attribute_prompt(lm, info, prompt, TARGET, steps=5)
    assert torch.allclose(dense(info, prompt, found.effect), own * total, atol=1e-5, rtol=1e-3)
    fine = attribute_prompt(lm, info, prompt, TARGET, steps=200)
    with torch.no_grad():
        none = float(by_hooks(lm, info, prompt, torch.zeros_like(own), TARGET))
    assert fine.effect.sum() == pytest.approx(found.metric - none, abs=2e-3)


def test_ablation_equals_hooks_that_take_the_latent_out(
    made: tuple[LanguageModel, SaeInfo, OnPrompt],
) -> None:
    """One latent at a time, at all tokens; a silent latent does nothing."""
    lm, info, prompt = made
    own = plain_activations(info, prompt)
    latents = sorted(set(prompt.latent.tolist()))[:11]
    silent = next(iter(set(range(info.d_sae)) - set(prompt.latent.tolist())), None)
    found = ablate(lm, info, prompt, TARGET, [*latents, *([] if silent is None else [silent])])
    with torch.no_grad():
        whole = float(by_hooks(lm, info, prompt, own, TARGET))
        for latent in latents:
            f = own.clone()
            f[:, latent] = 0
            expected = whole - float(by_hooks(lm, info, prompt, f, TARGET))
            assert found[latent] == pytest.approx(expected, abs=1e-4)
    if silent is not None:
        assert found[silent] == pytest.approx(0, abs=1e-6)


def test_attribution_agrees_with_ablation(
    made: tuple[LanguageModel, SaeInfo, OnPrompt],
) -> None:
    """The correlation says so; of too few values there is none."""
    lm, info, prompt = made
    estimated = attribute_prompt(lm, info, prompt, TARGET, steps=8).by_latent()
    latents = list(estimated)[:24]
    measured = ablate(lm, info, prompt, TARGET, latents)
    found = correlation([estimated[i] for i in latents], [measured[i] for i in latents])
    assert found["pearson"] > 0.6
    assert correlation([1.0, 1.0], [2.0, 3.0]) == {"pearson": None, "spearman": None}


def test_a_scaled_sae_has_its_scale_taken_into_account(
    made: tuple[LanguageModel, SaeInfo, OnPrompt], tmp_path: Any
) -> None:
    """Of an SAE that normalises tokens, a unit adds its decoder row over the token's scale."""
    lm, _, _ = made
    sae = models.make_sae(
        tmp_path / "sae", d_sae=96, kind="standard", normalize_activations="layer_norm"
    )
    info = inspect(sae)
    prompt = on_prompt(lm, info, None, make_text("t", lm.tokenizer, "", "hello"))
    latent = int(prompt.latent[0])
    found = ablate(lm, info, prompt, TARGET, [latent])
    row = read_decoder_rows(info, [latent])[0]
    f = activate(read_block(info, 0, info.d_sae), prompt.x, info.norm)[:, latent]
    f[torch.from_numpy(~prompt.looked)] = 0
    std = prompt.x.std(1)

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        x = (prompt.x - (f * (std + 1e-5))[:, None] * row)[None]
        return (x, *output[1:]) if isinstance(output, tuple) else x

    ids = torch.tensor([prompt.text.tokens])
    with torch.no_grad():
        whole = TARGET.metric(lm.model(ids).logits[:, -1])
        handle = lm.model.model.layers[info.layer].register_forward_hook(hook)
        without = TARGET.metric(lm.model(ids).logits[:, -1])
        handle.remove()
    assert found[latent] == pytest.approx(float(whole - without), abs=1e-4)
