"""What `benchmarks/overhead.py` serves: a random model, a random SAE, and policies on it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from saeguard.vllm.settings import Settings
from tests.models import random_policies, write_feature_set, write_policy


@dataclass(frozen=True)
class Size:
    """Shape of the model and of its SAE."""

    hidden: int
    layers: int
    latents: int

    @property
    def hooked(self) -> int:
        """The layer that the SAE reads."""
        return self.layers // 2

    @property
    def watched(self) -> tuple[int, ...]:
        """The 32 latents that policies read."""
        return tuple(range(0, self.latents, self.latents // 32))


FULL = Size(hidden=1024, layers=14, latents=65_536)
QUICK = Size(hidden=512, layers=8, latents=32_768)
TINY = Size(hidden=128, layers=2, latents=1024)
VOCABULARY = 2048


def make_model(path: Path, size: Size) -> int:
    """Save a random model of Qwen3's shape; return its number of parameters."""
    import transformers  # noqa: PLC0415 - after the environment is set

    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=size.hidden,
        intermediate_size=3 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 64,
        num_key_value_heads=size.hidden // 128,
        head_dim=128,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(path)
    return sum(p.numel() for p in model.parameters())


def make_sae(path: Path, size: Size) -> Path:
    """Write a random JumpReLU SAE in SAELens' format, without holding it twice."""
    path.mkdir(parents=True)
    torch.manual_seed(0)
    save_file(
        {
            "W_enc": torch.randn(size.hidden, size.latents).mul_(size.hidden**-0.5),
            "b_enc": torch.zeros(size.latents),
            "W_dec": torch.randn(size.latents, size.hidden).mul_(1e-3),
            "b_dec": torch.zeros(size.hidden),
            "threshold": torch.full((size.latents,), 1e-4),
        },
        path / "sae_weights.safetensors",
    )
    cfg = {
        "architecture": "jumprelu",
        "d_in": size.hidden,
        "d_sae": size.latents,
        "dtype": "float32",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "metadata": {
            "hook_name": f"blocks.{size.hooked}.hook_resid_post",
            "sae_lens_version": "6.0.0",
        },
    }
    (path / "cfg.json").write_text(json.dumps(cfg))
    return path


def make_policies(root: Path, state: str, sae: Path, size: Size) -> Settings:
    """Write the policies of one state; how far features range decides whether they fire."""
    folder = root / state
    high = 1e6 if state == "armed" else 1e-6
    write_feature_set(
        folder / "feature_sets" / "tiny.yaml",
        sae,
        latents=size.watched,
        layers=size.layers,
        high=high,
    )
    random_policies(folder / "policies", size.watched, seed=1, count=8)
    if state == "clamping":
        features = [f"f{latent}" for latent in size.watched[:4]]
        write_policy(
            folder / "policies" / "clamped.yaml",
            id="test.clamped",
            action="clamp",
            detect={
                x: {"feature": f, "above": 0.01} for x, f in zip("abcd", features, strict=True)
            },
            condition="a or b or c or d",
            clamp={"features": features, "to": 0},
        )
    return Settings(
        policies=str(folder / "policies"),
        feature_sets=str(folder / "feature_sets"),
        events=str(folder / "events.jsonl"),
        reload=False,
    )
