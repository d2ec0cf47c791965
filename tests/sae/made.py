"""Small checkpoints in published layouts, each with the formula of its authors in plain torch.

The formulas are transcribed from the sources named; none of them is this package's code.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

D, N, K = 32, 160, 10


@dataclass(frozen=True)
class Made:
    """A checkpoint on disk and what it computes."""

    path: Path
    """Folder, or the pickle to convert."""
    encode: Callable[[torch.Tensor], torch.Tensor]
    """[tokens, d_in] -> [tokens, d_sae]."""
    decode: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """x and f -> [tokens, d_in]."""


def draw(seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random tensors by SAELens' names, decoder rows with norms of 1 to 2."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(*shape, generator=g)

    W_dec = normal(N, D)
    W_dec *= (1 + torch.rand(N, 1, generator=g)) / W_dec.norm(dim=1, keepdim=True)
    return {
        "W_enc": normal(D, N),
        "b_enc": normal(N),
        "W_dec": W_dec,
        "b_dec": normal(D),
        "threshold": 0.1 + torch.rand(N, generator=g),
        "r_mag": normal(N),
        "b_mag": normal(N),
    }


def gemma_scope(root: Path, *, compressed: bool = False, fortran: bool = False) -> Made:
    """Make a Gemma Scope file (the tutorial notebook of the release: JumpReLUSAE)."""
    t = draw()
    path = root / "layer_1" / "width_160" / "average_l0_30"
    path.mkdir(parents=True)
    names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
    arrays = {name: t[name].numpy() for name in names}
    if fortran:
        arrays["W_enc"] = np.asfortranarray(arrays["W_enc"])
    (np.savez_compressed if compressed else np.savez)(path / "params.npz", **arrays)

    def encode(x: torch.Tensor) -> torch.Tensor:
        pre = x @ t["W_enc"] + t["b_enc"]
        return (pre > t["threshold"]) * torch.relu(pre)

    return Made(path, encode, lambda _, f: f @ t["W_dec"] + t["b_dec"])


def gemma_scope_2(root: Path) -> Made:
    """Make a Gemma Scope 2 checkpoint; the formula is Gemma Scope's."""
    t = draw()
    path = root / "layer_2_width_160_l0_medium"
    path.mkdir(parents=True)
    save_file(
        {k.replace("W", "w"): t[k] for k in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")},
        path / "params.safetensors",
    )
    config = {
        "architecture": "jump_relu",
        "model_name": "gemma-v3-4b-it",
        "hf_hook_point_in": "model.layers.2.output",
        "hf_hook_point_out": "model.layers.2.output",
        "width": N,
        "l0": 60,
        "affine_connection": False,
    }
    (path / "config.json").write_text(json.dumps(config))

    def encode(x: torch.Tensor) -> torch.Tensor:
        pre = x @ t["W_enc"] + t["b_enc"]
        return (pre > t["threshold"]) * torch.relu(pre)

    return Made(path, encode, lambda _, f: f @ t["W_dec"] + t["b_dec"])


AVERAGE_IN, AVERAGE_OUT, THETA = 9.5, 8.5, 0.4


def llama_scope(root: Path, convention: str) -> Made:
    """Make a Llama Scope checkpoint, read as its authors or as SAELens' loader does.

    openmoss: standardise by the data set's norm, then unit decoder rows, then the threshold in raw
    units (Language-Model-SAEs, revision 4ec6f0aa). saelens: `llama_scope_sae_huggingface_loader`
    followed by `fold_activation_norm_scaling_factor`.
    """
    t = draw()
    path = root / "Llama3_1-8B-Base-L2R-8x"
    (path / "checkpoints").mkdir(parents=True)
    save_file(
        {
            "encoder.weight": t["W_enc"].T.contiguous(),
            "encoder.bias": t["b_enc"],
            "decoder.weight": t["W_dec"].T.contiguous(),
            "decoder.bias": t["b_dec"],
        },
        path / "checkpoints" / "final.safetensors",
    )
    settings = {
        "d_model": D,
        "d_sae": N,
        "hook_point_in": "blocks.2.hook_resid_post",
        "hook_point_out": "blocks.2.hook_resid_post",
        "top_k": 50,
        "jump_relu_threshold": THETA,
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": AVERAGE_IN, "out": AVERAGE_OUT},
        "sparsity_include_decoder_norm": True,
    }
    (path / "hyperparams.json").write_text(json.dumps(settings))
    s_in, s_out = D**0.5 / AVERAGE_IN, D**0.5 / AVERAGE_OUT
    norms = t["W_dec"].norm(dim=1)

    def openmoss(x: torch.Tensor) -> torch.Tensor:
        # Standardise: what was learnt on x * s_in is written for x.
        W, b = t["W_enc"] * s_in, t["b_enc"]
        # Back to raw units, as `standardize_parameters_of_dataset_norm` leaves them.
        W, b = W / s_in, b / s_in
        pre = x @ (W * norms) + b * norms
        return pre * (pre > THETA)

    def saelens(x: torch.Tensor) -> torch.Tensor:
        pre = x @ (t["W_enc"] * s_in) + t["b_enc"]
        return torch.relu(pre) * (pre > THETA * s_in)

    def decode(_: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
        if convention == "saelens":
            return f @ (t["W_dec"] / s_in) + t["b_dec"] / s_in
        return (f @ (t["W_dec"] / norms[:, None]) * s_in + t["b_dec"]) / s_out

    return Made(path, openmoss if convention == "openmoss" else saelens, decode)


def llama_scope_r1(root: Path, factor: float) -> Made:
    """Make a Llama-Scope-R1-Distill checkpoint."""
    t = draw()
    path = root / "L1R"
    path.mkdir(parents=True)
    save_file(
        {
            "encoder.weight": t["W_enc"].T.contiguous(),
            "encoder.bias": t["b_enc"],
            "decoder.weight": t["W_dec"].T.contiguous(),
            "decoder.bias": t["b_dec"],
            "log_jumprelu_threshold": t["threshold"].log(),
        },
        path / "sae_weights.safetensors",
    )
    config = {"d_model": D, "expansion_factor": N // D, "hook_point_in": "blocks.1.hook_resid_post"}
    (path / "config.json").write_text(json.dumps(config))

    def encode(x: torch.Tensor) -> torch.Tensor:
        pre = (x * factor) @ t["W_enc"] + t["b_enc"]
        return pre * (pre > t["threshold"])

    return Made(path, encode, lambda _, f: (f @ t["W_dec"] + t["b_dec"]) / factor)


def goodfire(root: Path) -> Made:
    """Make Goodfire's pickle (model card: relu of a linear layer)."""
    t = draw()
    root.mkdir(parents=True, exist_ok=True)
    path = root / "Llama-3.1-8B-Instruct-SAE-l19.pth"
    torch.save(
        {
            "encoder_linear.weight": t["W_enc"].T.contiguous().bfloat16(),
            "encoder_linear.bias": t["b_enc"].bfloat16(),
            "decoder_linear.weight": t["W_dec"].T.contiguous().bfloat16(),
            "decoder_linear.bias": t["b_dec"].bfloat16(),
        },
        path,
    )
    s = {k: v.bfloat16().float() for k, v in t.items()}

    def encode(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ s["W_enc"] + s["b_enc"])

    return Made(path, encode, lambda _, f: f @ s["W_dec"] + s["b_dec"])


def openai(root: Path) -> Made:
    """Make OpenAI's GPT-2 pickle (sparse_autoencoder/model.py, TopK with normalised input)."""
    t = draw()
    root.mkdir(parents=True, exist_ok=True)
    path = root / "5.pt"
    torch.save(
        {
            "pre_bias": t["b_dec"],
            "encoder.weight": t["W_enc"].T.contiguous(),
            "latent_bias": t["b_enc"],
            "decoder.weight": t["W_dec"].T.contiguous(),
            "stats_last_nonzero": torch.zeros(N, dtype=torch.long),
            "activation": "TopK",
            "activation_state_dict": {"k": K, "postact_fn": "ReLU"},
        },
        path,
    )

    def normed(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mu = x.mean(dim=-1, keepdim=True)
        std = (x - mu).std(dim=-1, keepdim=True)
        return (x - mu) / (std + 1e-5), mu, std

    def encode(x: torch.Tensor) -> torch.Tensor:
        pre = (normed(x)[0] - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
        top = torch.topk(pre, k=K, dim=-1)
        return torch.zeros_like(pre).scatter(-1, top.indices, torch.relu(top.values))

    def decode(x: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
        _, mu, std = normed(x)
        return (f @ t["W_dec"] + t["b_dec"]) * std + mu

    return Made(path, encode, decode)


def qwen_scope(root: Path) -> Made:
    """Make Qwen-Scope's pickle (model card: top k of the pre-activations, no ReLU)."""
    t = draw()
    # So that among the kept ones some are below zero, which tells the card's reading from others.
    t["b_enc"] -= 6
    folder = root / f"SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}"
    folder.mkdir(parents=True)
    torch.save(
        {
            "W_enc": t["W_enc"].T.contiguous(),
            "W_dec": t["W_dec"].T.contiguous(),
            "b_enc": t["b_enc"],
            "b_dec": t["b_dec"],
        },
        folder / "layer7.sae.pt",
    )

    def encode(x: torch.Tensor) -> torch.Tensor:
        pre = x @ t["W_enc"] + t["b_enc"]
        top = pre.topk(K, -1)
        return torch.zeros_like(pre).scatter(-1, top.indices, top.values)

    return Made(folder / "layer7.sae.pt", encode, lambda _, f: f @ t["W_dec"] + t["b_dec"])


def dictionary_learning(root: Path, class_: str, **trainer: Any) -> Made:
    """Make an `ae.pt` beside its `config.json` (saprmarks/dictionary_learning, dictionary.py)."""
    t = draw()
    root.mkdir(parents=True, exist_ok=True)
    norms = t["W_dec"].norm(dim=1)
    theta = 0.7
    linear = {
        "encoder.weight": t["W_enc"].T.contiguous(),
        "decoder.weight": t["W_dec"].T.contiguous(),
    }
    matrices = {"W_enc": t["W_enc"], "W_dec": t["W_dec"], "b_enc": t["b_enc"], "b_dec": t["b_dec"]}
    numbers = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(theta)}
    state: dict[str, torch.Tensor] = {
        "AutoEncoder": {**linear, "encoder.bias": t["b_enc"], "bias": t["b_dec"]},
        "AutoEncoderNew": {**linear, "encoder.bias": t["b_enc"], "decoder.bias": t["b_dec"]},
        "GatedAutoEncoder": {
            **linear, "decoder_bias": t["b_dec"], "r_mag": t["r_mag"], "gate_bias": t["b_enc"],
            "mag_bias": t["b_mag"],
        },
        "JumpReluAutoEncoder": {**matrices, "threshold": t["threshold"]},
        "AutoEncoderTopK": {**linear, "encoder.bias": t["b_enc"], "b_dec": t["b_dec"], **numbers},
        "BatchTopKSAE": {**linear, "encoder.bias": t["b_enc"], "b_dec": t["b_dec"], **numbers},
        "MatryoshkaBatchTopKSAE": {
            **matrices, **numbers, "group_sizes": torch.tensor([N // 2, N // 2]),
        },
    }[class_]  # fmt: skip
    torch.save(state, root / "ae.pt")
    config = {
        "trainer": {
            "dict_class": class_, "activation_dim": D, "dict_size": N, "layer": 2,
            "lm_name": "tiny", "submodule_name": "resid_post_layer_2", "k": K, **trainer,
        },
        "buffer": {"ctx_len": 128, "d_submodule": D},
    }  # fmt: skip
    (root / "config.json").write_text(json.dumps(config))

    def encode(x: torch.Tensor) -> torch.Tensor:
        centred = (x - t["b_dec"]) @ t["W_enc"]
        if class_ == "AutoEncoder":
            return torch.relu(centred + t["b_enc"])
        if class_ == "AutoEncoderNew":
            return torch.relu(x @ t["W_enc"] + t["b_enc"])
        if class_ == "GatedAutoEncoder":
            gate = (centred + t["b_enc"] > 0).float()
            return gate * torch.relu(t["r_mag"].exp() * centred + t["b_mag"]) * norms
        if class_ == "JumpReluAutoEncoder":
            pre = x @ t["W_enc"] + t["b_enc"]
            return torch.relu(pre * (pre > t["threshold"])) * norms
        post = torch.relu(centred + t["b_enc"])
        if class_ == "AutoEncoderTopK":
            top = post.topk(K, sorted=False, dim=-1)
            return torch.zeros_like(post).scatter(-1, top.indices, top.values)
        return post * (post > theta)

    def decode(_: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
        if class_ in {"GatedAutoEncoder", "JumpReluAutoEncoder"}:
            f = f / norms
        return f @ t["W_dec"] + t["b_dec"]

    return Made(root / "ae.pt", encode, decode)
