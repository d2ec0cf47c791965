"""Texts with a planted latent: the search must find it, and nothing by luck."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from saeguard.features.corpus import Corpus

D, N = 128, 200
PLANTED = (17, 44)
"""Latents that fire in one token of each positive, one or the other by template."""


def save_sae(folder: Path) -> Path:
    """Write a JumpReLU SAE whose latents read random unit directions."""
    torch.manual_seed(5)
    directions = torch.nn.functional.normalize(torch.randn(N, D), dim=1)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {
            "W_enc": directions.t().contiguous(),
            "b_enc": torch.zeros(N),
            "W_dec": directions,
            "b_dec": torch.zeros(D),
            "threshold": torch.full((N,), 0.5),
        },
        folder / "sae_weights.safetensors",
    )
    cfg = {
        "architecture": "jumprelu",
        "d_in": D,
        "d_sae": N,
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "metadata": {"hook_name": "blocks.1.hook_resid_post"},
    }
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return folder


def corpus(split: str, texts: int = 80, *, signal: float = 3.0, kind: str = "k") -> Corpus:
    """Return texts of 10 tokens, 4 of them prompt; every other one is positive."""
    rng = np.random.default_rng([ord(c) for c in split])
    torch.manual_seed(5)
    directions = torch.nn.functional.normalize(torch.randn(N, D), dim=1).numpy()
    lengths = np.full(texts, 10)
    x = 0.3 * rng.standard_normal((texts * 10, D)).astype(np.float32)
    label = np.arange(texts) % 2 == 0
    for i in np.flatnonzero(label):
        at = 10 * i + 4 + rng.integers(6)
        x[at] += signal * directions[PLANTED[i // 2 % 2]]
    output = np.tile(np.arange(10) >= 4, texts)
    return Corpus(
        x=torch.from_numpy(x),
        layers=(1,),
        tokens=np.tile(np.arange(10), texts),
        lengths=lengths,
        output=output,
        special=np.tile(np.arange(10) == 0, texts),
        label=label,
        kind=np.full(texts, kind),
        template=np.array([f"{split}.{i // 4}" for i in range(texts)]),
    )
