"""Small random models and SAEs, made on the spot, for tests that drive real engines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata

from saeguard.sae import inspect
from tests.tiny import tokenizer

VOCABULARY = 512
HIDDEN = 64
LAYERS = 3


def configs() -> dict[str, Any]:
    """Return one small configuration per model family, by name."""
    import transformers as t

    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 128,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "max_position_embeddings": 4096,
    }
    grouped = {**common, "num_key_value_heads": 1}
    return {
        "llama": t.LlamaConfig(**grouped),
        "qwen3": t.Qwen3Config(**grouped, head_dim=32),
        "gemma2": t.Gemma2Config(**grouped, head_dim=32, query_pre_attn_scalar=32),
        "gemma3": t.Gemma3TextConfig(**grouped, head_dim=32, query_pre_attn_scalar=32),
        "gpt2": t.GPT2Config(
            vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=LAYERS, n_head=2, n_positions=512
        ),
        "gpt_neox": t.GPTNeoXConfig(**common, rotary_pct=0.25),
    }


def make_model(family: str, path: Path, seed: int = 0) -> Path:
    """Save a random model of `family` with weights large enough to make tokens differ."""
    import transformers as t

    torch.manual_seed(seed)
    config = configs()[family]
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 0
    model = t.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.12)
            elif "bias" in name:
                parameter.normal_(0, 0.02)
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def make_sae(
    path: Path,
    *,
    layer: int = 1,
    d_in: int = HIDDEN,
    d_sae: int = 256,
    kind: str = "jumprelu",
    seed: int = 0,
) -> Path:
    """Save a random SAE with SAELens's own code."""
    torch.manual_seed(seed)
    metadata = SAEMetadata(hook_name=f"blocks.{layer}.hook_resid_post", model_name="tiny")
    common = {"d_in": d_in, "d_sae": d_sae, "apply_b_dec_to_input": True, "metadata": metadata}
    sae: Any = (
        JumpReLUSAE(JumpReLUSAEConfig(**common))
        if kind == "jumprelu"
        else StandardSAE(StandardSAEConfig(**common))
    )
    with torch.no_grad():
        sae.W_enc.normal_(0, 0.3)
        sae.b_enc.normal_(0, 0.1)
        sae.W_dec.normal_(0, 0.3)
        sae.b_dec.normal_(0, 0.1)
        if kind == "jumprelu":
            sae.threshold.uniform_(0.05, 0.6)
    sae.save_model(path)
    return path


@dataclass(frozen=True)
class Guarded:
    """A directory with everything a guarded engine needs."""

    model: Path
    sae: Path
    policies: Path
    feature_sets: Path
    latents: tuple[int, ...]

    def settings(self, **more: Any) -> dict[str, Any]:
        """Return the `saeguard` object of `--additional-config`."""
        return {"policies": str(self.policies), "feature_sets": str(self.feature_sets), **more}


def write_feature_set(
    path: Path, sae: Path, *, latents: tuple[int, ...], layers: int = LAYERS, high: float = 1.0
) -> None:
    """Write a feature set of one feature `f{latent}` per latent."""
    info = inspect(sae)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        yaml.safe_dump(
            {
                "schema": "saeguard.features/v1",
                "id": path.stem,
                "title": "random latents for tests",
                "model": {"name": "tiny", "hidden_size": info.d_in, "num_layers": layers},
                "sae": {
                    "path": str(sae),
                    "sha256": info.sha256,
                    "layer": info.layer,
                    "d_in": info.d_in,
                    "d_sae": info.d_sae,
                },
                "exclude_tokens": [1],
                "features": {
                    f"f{latent}": {
                        "title": f"latent {latent}",
                        "behaviour": "none",
                        "detect": {latent: 1.0},
                        "clamp": {latent: 1.0},
                        "low": 0.0,
                        "high": high,
                        "threshold": 0.5,
                        "evidence": {},
                    }
                    for latent in latents
                },
            },
            sort_keys=False,
        )
    )


def write_policy(path: Path, **fields: Any) -> None:
    """Write a policy file, with defaults for what a test does not care about."""
    policy = {
        "schema": "saeguard.policy/v1",
        "id": path.stem,
        "title": "a test policy",
        "owner": "tests@example.com",
        "severity": "low",
        "mode": "enforce",
        "action": "flag",
        "on_error": "allow",
        "scope": "both",
        "feature_set": "tiny",
        "rationale": "for tests",
        **fields,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(policy, sort_keys=False))


def random_policies(
    folder: Path, latents: tuple[int, ...], seed: int = 0, count: int = 6, most: float = 1.2
) -> None:
    """Write policies over random conditions, windows and scopes, all flagging."""
    rng = np.random.default_rng(seed)
    conditions = ["a", "a and b", "a or b", "a and not b", "2 of (a, b, c)", "a or (b and c)"]
    windows = ["1 of 1 tokens", "2 of 4 tokens", "3 of 8 tokens", "1 of 3 tokens"]
    for i in range(count):
        condition = conditions[i % len(conditions)]
        names = [n for n in "abc" if n in condition.replace("and", "&").replace("not", "!")]
        picked = rng.choice(latents, len(names), replace=False)
        write_policy(
            folder / f"p{i}.yaml",
            id=f"test.p{i}",
            scope=["both", "prompt", "output"][i % 3],
            detect={
                n: {"feature": f"f{latent}", "above": round(float(rng.uniform(0.2, most)), 3)}
                for n, latent in zip(names, picked, strict=True)
            },
            condition=condition,
            **{"for": str(windows[int(rng.integers(len(windows)))])},
            keep=int(rng.integers(0, 4)),
        )


def make_guarded(root: Path, family: str = "llama", seed: int = 0, *, most: float = 1.2) -> Guarded:
    """Make a random model, SAE, feature set and policies with thresholds up to `most`."""
    model = make_model(family, root / "model", seed)
    sae = make_sae(root / "sae", seed=seed)
    latents = tuple(range(0, 64, 4))
    write_feature_set(root / "feature_sets" / "tiny.yaml", sae, latents=latents)
    random_policies(root / "policies", latents, seed, most=most)
    return Guarded(model, sae, root / "policies", root / "feature_sets", latents)
