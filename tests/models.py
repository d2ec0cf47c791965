"""Small random models and SAEs, made on the spot, for tests that drive real engines."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from saeguard.sae import inspect
from tests.tiny import tokenizer

ADAPTED = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""The matrices that `make_adapter` adapts."""
VOCABULARY = 512
HIDDEN = 64
LAYERS = 3


COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 4096,
}
GROUPED = {"num_key_value_heads": 1}
HEADS = {"num_key_value_heads": 1, "head_dim": 32}
EXPERTS = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
GEMMA = {**HEADS, "query_pre_attn_scalar": 32, "sliding_window": 24}
LATENT = {
    "q_lora_rank": None,
    "kv_lora_rank": 512,  # this and the next: the sizes that vLLM's kernels are made for
    "qk_rope_head_dim": 64,
    "head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": {**HEADS, "sliding_window": 24},
    "qwen2": GROUPED,
    "qwen3": HEADS,
    "qwen3_moe": {**HEADS, **EXPERTS},
    "mixtral": {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma": HEADS,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "phi": GROUPED,
    "phi3": GROUPED,
    "gpt2": {},
    "gpt_neox": {"rotary_pct": 0.25},
    "olmo2": GROUPED,
    "granite": {
        **GROUPED,
        "residual_multiplier": 0.22,
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.1,
        "logits_scaling": 8.0,
    },
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True},
    "stablelm": GROUPED,
    "cohere": GROUPED,
    "deepseek_v2": LATENT,
    "deepseek_v3": {**LATENT, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "gpt_oss": {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 24},
}
"""Small configurations, by Transformers' model type: what differs from `COMMON`."""


def config_of(family: str) -> Any:
    """Return the small configuration of a model family."""
    import transformers

    return transformers.AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family]})


def make_model(family: str, path: Path, seed: int = 0) -> Path:
    """Save a random model of `family` with weights large enough to make tokens differ."""
    import transformers as t

    torch.manual_seed(seed)
    config = config_of(family)
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
    **options: Any,
) -> Path:
    """Save a random SAE with SAELens's own code; `options` go to its configuration."""
    import sae_lens
    from sae_lens.saes.sae import SAEMetadata

    torch.manual_seed(seed)
    metadata = SAEMetadata(hook_name=f"blocks.{layer}.hook_resid_post", model_name="tiny")
    common = {"d_in": d_in, "d_sae": d_sae, "apply_b_dec_to_input": True, "metadata": metadata}
    name = {"jumprelu": "JumpReLU", "standard": "Standard", "gated": "Gated", "topk": "TopK"}[kind]
    config = getattr(sae_lens, f"{name}SAEConfig")(**common, **options)
    sae: Any = getattr(sae_lens, f"{name}SAE")(config)
    with torch.no_grad():
        # In one order for all kinds: what tests expect to fire hangs on the draws.
        common_first = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
        named = dict(sae.named_parameters())
        for tensor in sorted(
            named, key=lambda n: (n not in common_first, (*common_first, n).index(n))
        ):
            parameter = named[tensor]
            if tensor == "threshold":
                parameter.uniform_(0.05, 0.6)
            else:
                parameter.normal_(0, 0.3 if parameter.dim() > 1 else 0.1)
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
        # Without `reload`, which starts a process of its own for each engine.
        folders = {"policies": str(self.policies), "feature_sets": str(self.feature_sets)}
        return {**folders, "reload": False, "event_lines": "all", **more}


def write_feature_set(
    path: Path,
    sae: Path,
    *,
    latents: tuple[int, ...],
    layers: int = LAYERS,
    high: float = 1.0,
    name: str | None = None,
    model_sha256: str | None = None,
) -> None:
    """Write a feature set of one feature `f{latent}` per latent; `name` if not the file's."""
    info = inspect(sae)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        yaml.safe_dump(
            {
                "schema": "saeguard.features/v1",
                "id": name or path.stem,
                "title": "random latents for tests",
                "model": {
                    "name": "tiny",
                    "hidden_size": info.d_in,
                    "num_layers": layers,
                    **({"sha256": model_sha256} if model_sha256 else {}),
                },
                "sae": {
                    "path": str(sae),
                    "sha256": info.sha256,
                    **({"config_sha256": info.config_sha256} if info.config_sha256 else {}),
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
        "accept_weak": "features of random latents have no calibrated range",
        **fields,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(policy, sort_keys=False))


def random_policies(
    folder: Path,
    latents: tuple[int, ...],
    seed: int = 0,
    count: int = 6,
    most: float = 1.2,
    *,
    feature_set: str = "tiny",
    prefix: str = "test",
) -> None:
    """Write policies `prefix.p0`... over random conditions, windows and scopes, all flagging."""
    rng = np.random.default_rng(seed)
    conditions = ["a", "a and b", "a or b", "a and not b", "2 of (a, b, c)", "a or (b and c)"]
    windows = ["1 of 1 tokens", "2 of 4 tokens", "3 of 8 tokens", "1 of 3 tokens"]
    for i in range(count):
        condition = conditions[i % len(conditions)]
        names = [n for n in "abc" if n in condition.replace("and", "&").replace("not", "!")]
        picked = rng.choice(latents, len(names), replace=False)
        write_policy(
            folder / f"p{i}.yaml",
            id=f"{prefix}.p{i}",
            feature_set=feature_set,
            scope=["both", "prompt", "output"][i % 3],
            detect={
                n: {"feature": f"f{latent}", "above": round(float(rng.uniform(0.2, most)), 3)}
                for n, latent in zip(names, picked, strict=True)
            },
            condition=condition,
            **{"for": str(windows[int(rng.integers(len(windows)))])},
            keep=int(rng.integers(0, 4)),
        )


def make_adapter(path: Path, model: Path, seed: int = 0, *, rank: int = 8) -> Path:
    """Save a random LoRA adapter for some of a Llama's matrices, in PEFT's format."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    with safe_open(model / "model.safetensors", "pt") as weights:
        for name in weights.keys():  # noqa: SIM118 - not a mapping
            if name.split(".")[-2] in ADAPTED:
                rows, columns = weights.get_slice(name).get_shape()
                stem = f"base_model.model.{name.removesuffix('.weight')}"
                for part, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                    tensors[f"{stem}.lora_{part}.weight"] = 0.15 * torch.randn(
                        shape, generator=generator
                    )
    path.mkdir(parents=True)
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ADAPTED}))
    return path


def merge_adapter(model: Any, adapter: Path) -> Any:
    """Add an adapter's products to the weights of a Transformers model."""
    from safetensors.torch import load_file

    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{stem}.lora_A.weight" in tensors:
                product = tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
                parameter.add_(product, alpha=config["lora_alpha"] / config["r"])
    return model


def make_guarded(root: Path, family: str = "llama", seed: int = 0, *, most: float = 1.2) -> Guarded:
    """Make a random model, SAE, feature set and policies with thresholds up to `most`."""
    model = make_model(family, root / "model", seed)
    sae = make_sae(root / "sae", seed=seed)
    latents = tuple(range(0, 64, 4))
    write_feature_set(root / "feature_sets" / "tiny.yaml", sae, latents=latents)
    random_policies(root / "policies", latents, seed, most=most)
    return Guarded(model, sae, root / "policies", root / "feature_sets", latents)
