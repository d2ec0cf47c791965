"""What the engines of `benchmarks/gpu.py` serve: a model, a random SAE that fits it, policies."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.gpu_engines import WRITTEN
from tests.fixture.words import save_model
from tests.models import random_policies, write_feature_set, write_policy

LATENTS, WATCHED, CLAMPED = 16_384, 32, 4
THRESHOLD = 1e-4
"""Activations from which latents show: about every second does on any token."""
CLAMPED_TO = 100.0
"""The activation that clamped latents are set to. Rows of the decoder are of length 1, the residual
of SmolLM2-135M is about 200 long: too weak a clamp changes no text."""
BOS = 1
"""The token that the feature set excludes."""
WIDTH = 256
"""Of the model that is made if none is given."""
ASKS = (
    "What is {}?",
    "Explain {} to a child of ten, in three sentences.",
    "Write a short Python function that has to do with {}, and say what it does.",
    "Somebody told me that {} is overrated. I half agree, but I would like to hear both sides.",
)
THINGS = ("sorting", "a hash table", "the tide", "recursion", "rust", "a proxy", "yeast", "a fugue")


@dataclass(frozen=True)
class Model:
    """The model that is served."""

    path: Path
    width: int
    layers: int
    vocabulary: int
    eos: int

    @property
    def hooked(self) -> int:
        """The layer that the SAE reads."""
        return self.layers // 2


def look_at(path: Path) -> Model:
    """Read a model's configuration."""
    config = json.loads((path / "config.json").read_text())
    return Model(
        path=path,
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        vocabulary=config["vocab_size"],
        eos=config["eos_token_id"],
    )


def latents() -> tuple[int, ...]:
    """Return what the policies watch."""
    return tuple(range(0, LATENTS, LATENTS // WATCHED))


def write_sae(path: Path, model: Model) -> Path:
    """Write a random JumpReLU SAE in SAELens' format."""
    path.mkdir(parents=True)
    torch.manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(LATENTS, model.width), dim=1)
    tensors = {
        "W_enc": directions.t().contiguous(),
        "b_enc": torch.zeros(LATENTS),
        "W_dec": directions,
        "b_dec": torch.zeros(model.width),
        "threshold": torch.full((LATENTS,), THRESHOLD),
    }
    save_file(tensors, path / "sae_weights.safetensors")
    config = {
        "architecture": "jumprelu",
        "d_in": model.width,
        "d_sae": LATENTS,
        "dtype": "float32",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "metadata": {"hook_name": f"blocks.{model.hooked}.hook_resid_post"},
    }
    (path / "cfg.json").write_text(json.dumps(config))
    return path


def write_guards(folder: Path, model: Model) -> dict[str, dict[str, Any]]:
    """Write the SAE and the policies; return the `saeguard` settings of each guarded state."""
    sae = write_sae(folder / "sae", model)
    out = {}
    for state in ("armed", "firing", "clamping"):
        root = folder / state
        high = 1e6 if state == "armed" else 1e-6
        features = root / "feature_sets" / "tiny.yaml"
        write_feature_set(features, sae, latents=latents(), layers=model.layers, high=high)
        random_policies(root / "policies", latents(), seed=1, count=6)
        for name in ("x", "y"):
            detect = {"a": {"feature": f"f{latents()[-1]}", "above": 0.5}}
            write_policy(
                root / "policies" / f"{name}.yaml",
                id=f"log.{name}", action="log", detect=detect, condition="a",
            )  # fmt: skip
        if state == "clamping":
            _write_clamp(root / "policies" / "clamped.yaml")
        out[state] = {
            "policies": str(root / "policies"),
            "feature_sets": str(root / "feature_sets"),
            "events": str(root / "events.jsonl"),
            "reload": False,
        }
    return out


def _write_clamp(path: Path) -> None:
    """Write a policy that clamps from the first token on at which a clamped latent fires."""
    features = [f"f{latent}" for latent in latents()[:CLAMPED]]
    write_policy(
        path,
        id="test.clamped",
        action="clamp",
        detect={
            name: {"feature": feature, "above": 0.01}
            for name, feature in zip("abcd", features, strict=True)
        },
        condition="a or b or c or d",
        clamp={"features": features, "activation": CLAMPED_TO},
    )


def write_prompts(model: Model, count: int, longest: int) -> list[list[int]]:
    """Return prompts as token ids: chats if the model can read them, else random ones."""
    if (model.path / "tokenizer.json").exists() and (model.path / "chat_template.jinja").exists():
        from transformers import AutoTokenizer  # noqa: PLC0415 - seconds

        tokenizer = AutoTokenizer.from_pretrained(model.path)
        asked = [ask.format(thing) for thing in THINGS for ask in ASKS]
        told = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": asked[i % len(asked)]}],
                add_generation_prompt=True,
                return_dict=True,
            )
            for i in range(count)
        ]
        return [list(one["input_ids"])[:longest] for one in told]
    drawn = torch.randint(3, model.vocabulary, (count, 16), generator=torch.manual_seed(0))
    return [[BOS, *row] for row in drawn.tolist()]


@torch.inference_mode()
def gaps(
    model: Model, sae: Path, texts: list[tuple[list[int], list[int]]], dtype: str, *, clamp: bool
) -> list[list[float]]:
    """Return by how much Transformers prefers another token to each one that was generated.

    The model reads each text once, on the device, with a plain forward hook that clamps as the
    policy says: attention is causal, so this is what it would have seen while generating. 0 where
    the token is the likeliest.

    Args:
        model: the model.
        sae: the SAE's folder.
        texts: prompts and what followed.
        dtype: of the model.
        clamp: whether to clamp.
    """
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - seconds

    on = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lm: Any = AutoModelForCausalLM.from_pretrained(model.path, dtype=getattr(torch, dtype))
    lm = lm.to(on).eval()
    tensors = load_file(sae / "sae_weights.safetensors")
    at = list(latents()[:CLAMPED])
    W_enc, W_dec = tensors["W_enc"][:, at].to(on), tensors["W_dec"][at].to(on)
    ids: list[int] = []

    def edit(_module: Any, _inputs: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        z = x[0].float() @ W_enc
        f = z * (z > THRESHOLD)
        evaluable = torch.tensor(ids, device=on) != BOS
        on_ = ((f > 0).any(1) & evaluable).cumsum(0) > 0
        delta = torch.where(on_[:, None], CLAMPED_TO - f, 0.0) @ W_dec
        x = x + delta.to(x.dtype)[None]
        return (x, *output[1:]) if isinstance(output, tuple) else x

    if clamp:
        lm.model.layers[model.hooked].register_forward_hook(edit)
    out = []
    for prompt, answer in texts:
        ids[:] = [*prompt, *answer]
        logits = lm(input_ids=torch.tensor([ids], device=on), use_cache=False).logits[0].float()
        before = logits[len(prompt) - 1 : -1]
        chosen = before.gather(1, torch.tensor(answer, device=on)[:, None])[:, 0]
        out.append((before.amax(1) - chosen).tolist())
    return out


def main() -> None:
    """Write the SAE, the policies and the prompts, and a file that says where they are."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--prompts", type=int, required=True)
    parser.add_argument("--longest", type=int, required=True)
    args = parser.parse_args()
    model = look_at(args.model or save_model(args.folder / "model", WIDTH))
    told = {
        "model": str(model.path),
        "guards": write_guards(args.folder, model),
        "sae": str(args.folder / "sae"),
        "prompts": write_prompts(model, args.prompts, args.longest),
        "vocabulary": model.vocabulary,
        "eos": model.eos,
    }
    (args.folder / WRITTEN).write_text(json.dumps(told))


if __name__ == "__main__":
    main()
