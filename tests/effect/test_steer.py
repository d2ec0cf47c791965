"""Steering sets a latent at every token, and shows answers with their loss."""

from __future__ import annotations

import pytest
import torch

from saeguard.effect.attribute import Scored
from saeguard.effect.steer import Sampling, steer
from saeguard.hf.model import LanguageModel, load_model
from saeguard.hf.residuals import on_output
from saeguard.sae import SaeInfo, activate, inspect, read_decoder_rows, read_rows
from tests import models

PROMPT = (1, 70, 71, 72, 73)
LATENT = 3


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[LanguageModel, SaeInfo]:
    """A small random model, and an SAE on its middle layer."""
    root = tmp_path_factory.mktemp("steer")
    lm = load_model(models.make_model("llama", root / "model"))
    return lm, inspect(models.make_sae(root / "sae", d_sae=48))


def by_hand(lm: LanguageModel, info: SaeInfo, activation: float, tokens: int) -> list[int]:
    """Return the likeliest tokens with the latent set at each token but BOS, one by one."""
    rows, W_dec = read_rows(info, [LATENT]), read_decoder_rows(info, [LATENT])
    ids = list(PROMPT)

    def change(x: torch.Tensor) -> torch.Tensor:
        edited = x[0] + (activation - activate(rows, x[0])) @ W_dec
        return torch.cat([x[0, :1], edited[1:]])[None]

    with torch.no_grad(), on_output(lm, info.layer, change):
        for _ in range(tokens):
            ids.append(int(lm.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


def test_answers_are_those_of_an_edit_at_every_token(made: tuple[LanguageModel, SaeInfo]) -> None:
    """With a cache or without, the same tokens; the first arm has no edit."""
    lm, info = made
    sampling = Sampling(max_tokens=6)
    arms = steer(lm, info, LATENT, PROMPT, [(3.0, 30.0)], sampling=sampling, excluded=(0, 1, 2))
    assert [arm.scale for arm in arms] == [None, 3.0]
    assert arms[0].activation is None
    expected = lm.tokenizer.decode(by_hand(lm, info, 30.0, 6), skip_special_tokens=True)
    assert arms[1].samples == (expected,)
    assert arms[1].samples != arms[0].samples


def test_the_loss_grows_under_a_strong_edit(made: tuple[LanguageModel, SaeInfo]) -> None:
    """On the plain answer, or on texts; attention sinks and excluded tokens are not edited."""
    lm, info = made
    sampling = Sampling(max_tokens=4)
    plain, strong = steer(lm, info, LATENT, PROMPT, [(1.0, 50.0)], sampling=sampling)
    assert strong.loss > plain.loss
    texts = [Scored((1, 80, 81, 82), 2, 1, "q", "t")]
    on_texts = steer(lm, info, LATENT, PROMPT, [(1.0, 50.0)], sampling=sampling, texts=texts)
    assert on_texts[0].loss != pytest.approx(plain.loss)
    spared = steer(lm, info, LATENT, PROMPT, [(1.0, 50.0)], sampling=sampling, bound=0.0)
    assert spared[1].loss == pytest.approx(spared[0].loss)
    assert spared[1].samples == spared[0].samples


def test_samples_are_drawn_from_the_seed(made: tuple[LanguageModel, SaeInfo]) -> None:
    """As many as asked for, the same again."""
    lm, info = made
    drawn = [
        steer(lm, info, LATENT, PROMPT, [], sampling=Sampling(8, 3, 1.5, seed))[0].samples
        for seed in (0, 0, 1)
    ]
    assert len(set(drawn[0])) == 3
    assert drawn[0] == drawn[1] != drawn[2]
