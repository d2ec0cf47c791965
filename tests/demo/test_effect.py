"""The effect of an edit is measured on the output tokens, whatever the batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from demo.effect import contrast, output_logprob, setting
from saeguard.hf.model import load_model
from saeguard.hf.texts import Text
from saeguard.sae import inspect, read_decoder_rows, read_rows
from tests.guarded import LAYER, feature_set
from tests.tiny import save_model

TEXTS = [Text("a", (1, 50, 60, 70, 80), 2), Text("b", (1, *range(40, 90)), 30)]


def test_logprob_is_the_loss_on_output_tokens(tmp_path: Path) -> None:
    """Transformers' own loss, with the prompt masked, is the same number."""
    lm = load_model(save_model(tmp_path))
    got = output_logprob(lm, TEXTS, LAYER)
    for text, value in zip(TEXTS, got, strict=True):
        ids = torch.tensor([text.tokens])
        labels = ids.clone()
        labels[:, : text.prompt_tokens] = -100
        with torch.no_grad():
            assert value == pytest.approx(-lm.model(ids, labels=labels).loss.item(), rel=1e-4)


def test_setting_latents_to_themselves_is_no_edit(tmp_path: Path) -> None:
    """Silent latents that are set to zero change nothing; loud ones set to five do."""
    lm = load_model(save_model(tmp_path / "model"))
    info = inspect(feature_set(tmp_path / "set", lm.hidden_size).sae.path)
    rows, W_dec = read_rows(info, [1, 2]), read_decoder_rows(info, [1, 2])
    plain = output_logprob(lm, TEXTS, LAYER)
    rows.theta.fill_(1e9)
    same = output_logprob(lm, TEXTS, LAYER, setting(rows, W_dec, torch.zeros(2)))
    np.testing.assert_array_equal(same, plain)
    loud = output_logprob(lm, TEXTS, LAYER, setting(rows, W_dec, torch.full((2,), 5.0)))
    assert (loud != plain).all()


def test_contrast() -> None:
    """Positives minus negatives."""
    assert contrast(np.array([-1.0, -2.0, -4.0]), np.array([True, True, False])) == 2.5
