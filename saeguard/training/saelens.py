"""The SAE in training, and its trainer: both are SAELens' own."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from saeguard.training.settings import Settings

WEIGHTS = "sae_weights.safetensors"
MATRICES = ("W_enc", "W_dec")
"""Stored in 16 bits where that is asked for; biases and thresholds stay float32."""


def make_trainer(settings: Settings, device: str, mean: torch.Tensor, scale: float) -> Any:
    """Return SAELens' trainer of a new SAE.

    Args:
        settings: of the run.
        device: to train on.
        mean: [d_in] mean residual, where `b_dec` begins.
        scale: brings residuals to a norm of about sqrt(d_in).
    """
    from sae_lens.config import SAETrainerConfig  # noqa: PLC0415 - takes seconds, and is an extra
    from sae_lens.training.sae_trainer import SAETrainer  # noqa: PLC0415

    torch.manual_seed(settings.seed)
    sae = _make_sae(settings, device)
    with torch.no_grad():
        sae.b_dec.copy_(mean * scale)
    config = SAETrainerConfig(
        total_training_samples=settings.steps * settings.batch,
        train_batch_size_samples=settings.batch,
        lr=settings.lr,
        lr_end=settings.lr,
        lr_warm_up_steps=max(1, settings.steps // 20),
        lr_decay_steps=max(1, settings.steps // 4),
        dead_feature_window=settings.dead_after,
        device=device,
    )
    trainer: Any = SAETrainer(config, sae, _nothing())
    trainer.activation_scaler.scaling_factor = scale
    return trainer


def _make_sae(settings: Settings, device: str) -> Any:
    from sae_lens.saes.batchtopk_sae import (  # noqa: PLC0415 - as above
        BatchTopKTrainingSAE,
        BatchTopKTrainingSAEConfig,
    )
    from sae_lens.saes.jumprelu_sae import (  # noqa: PLC0415
        JumpReLUTrainingSAE,
        JumpReLUTrainingSAEConfig,
    )
    from sae_lens.saes.sae import SAEMetadata  # noqa: PLC0415

    common: dict[str, Any] = {
        "d_in": settings.d_in,
        "d_sae": settings.latents,
        "device": device,
        "normalize_activations": "expected_average_only_in",
        "metadata": SAEMetadata(
            model_name=settings.model,
            hook_name=f"blocks.{settings.layer}.hook_resid_post",
            context_size=settings.context,
        ),
    }
    if settings.kind == "batchtopk":
        from saeguard.training.sparse_step import SparseBatchTopK  # noqa: PLC0415 - as above

        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        # Accelerators multiply dense matrices faster than they gather rows.
        made = SparseBatchTopK if device == "cpu" else BatchTopKTrainingSAE
        return made(BatchTopKTrainingSAEConfig(k=settings.k, **common))
    return JumpReLUTrainingSAE(
        JumpReLUTrainingSAEConfig(
            # Gemma Scope 2: a penalty on the distance from the L0 that is wanted.
            jumprelu_sparsity_loss_mode="quadratic",
            target_l0=settings.k,
            l0_warm_up_steps=settings.steps // 10,
            pre_act_loss_coefficient=3e-6,
            **common,
        )
    )


def _nothing() -> Iterator[torch.Tensor]:
    """Return no batches: they are passed to `step`, and the trainer requests none itself."""
    return iter(())


def save_state(trainer: Any, folder: Path) -> None:
    """Write SAE, optimiser, schedules and counters of a run."""
    trainer.sae.save_model(folder)
    trainer.save_trainer_state(folder)
    torch.save(_random_state(), folder / "random.pt")


def load_state(trainer: Any, folder: Path) -> None:
    """Restore what `save_state` wrote."""
    trainer.sae.load_weights_from_checkpoint(folder)
    trainer.load_trainer_state(folder)
    state = torch.load(folder / "random.pt", weights_only=True)
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def save_result(trainer: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write the SAE for inference, in SAELens' layout and in the units of the residual.

    It includes the threshold: the running one of BatchTopK, or those that JumpReLU learnt.
    """
    sae = trainer.sae
    scale = trainer.activation_scaler.scaling_factor
    if scale is not None:
        sae.fold_activation_norm_scaling_factor(scale)
        trainer.activation_scaler.scaling_factor = None
    if sae.cfg.architecture() == "jumprelu":
        sae.threshold.data.clamp_(min=0.0)
        sae.fold_W_dec_norm()  # of BatchTopK it is done on saving
    sae.cfg.device = "cpu"
    sae.save_inference_model(folder)
    tensors = load_file(folder / WEIGHTS)
    for name, tensor in tensors.items():
        tensors[name] = tensor.to(dtype if name in MATRICES else torch.float32).contiguous()
    save_file(tensors, folder / WEIGHTS)


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state
