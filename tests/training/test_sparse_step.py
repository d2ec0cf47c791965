"""The sparse step is SAELens' dense step, loss and gradients, to rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.training.planted import D, Planted

ROWS, LATENTS = 256, 96


def _step(kind: Any, dead: int, threshold: float) -> tuple[Any, Any]:
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    torch.manual_seed(0)
    sae = kind(BatchTopKTrainingSAEConfig(d_in=D, d_sae=LATENTS, k=3))
    with torch.no_grad():
        sae.W_dec.mul_(torch.rand(LATENTS, 1) + 0.5)
        sae.b_enc.normal_(0, 0.1)
        sae.b_dec.normal_(0, 1)
    sae.topk_threshold = torch.tensor(threshold, dtype=torch.double)
    mask = torch.zeros(LATENTS, dtype=torch.bool)
    mask[torch.randperm(LATENTS)[:dead]] = True
    out = sae.training_forward_pass(
        TrainStepInput(
            sae_in=Planted().block(0).x[:ROWS] / 5,
            coefficients={},
            dead_neuron_mask=mask,
            n_training_steps=1,
            is_logging_step=False,
        )
    )
    out.loss.backward()
    return sae, out


@pytest.mark.parametrize("dead", [0, 5, 60])
@pytest.mark.parametrize("threshold", [0.0, 0.2, 1e6])
def test_a_step(dead: int, threshold: float) -> None:
    """Loss, activations, threshold and every gradient agree, whatever the threshold was before."""
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE

    from saeguard.training.sparse_step import SparseBatchTopK

    dense, expected = _step(BatchTopKTrainingSAE, dead, threshold)
    sparse, found = _step(SparseBatchTopK, dead, threshold)
    for name, loss in expected.losses.items():
        torch.testing.assert_close(found.losses[name], loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.sae_out, expected.sae_out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        found.feature_acts.to_dense(), expected.feature_acts, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(sparse.topk_threshold, dense.topk_threshold, rtol=1e-5, atol=1e-9)
    theirs = dict(dense.named_parameters())
    for name, parameter in sparse.named_parameters():
        torch.testing.assert_close(
            parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-4, msg=name
        )
