"""Train the demo's sparse autoencoder on one layer's residual stream. Seeded and resumable.

A BatchTopK SAE: on each batch the k activations per token that are largest over the whole batch
survive. The cut it uses is averaged and saved as a threshold, so the saved SAE is a JumpReLU one.
No label is read.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import LlamaForCausalLM

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demo.common import MODEL_DIR, SAE_DIR, SPECIAL, WORK_DIR, Clock, read_json, write_json
from demo.corpus.build import SEED
from demo.train_model import LENGTH, VALIDATION_ROWS, Rows, prepare

LATENTS = 4096
ACTIVE = 32  # latents per token
TOKENS = 400_000  # recorded
BATCH = 1024
STEPS = 2500
LEARNING_RATE = 1e-3
AUX = 1 / 32
DEAD_AFTER = 200  # steps without firing
SAVE_EVERY = 120.0


@dataclass
class Sae:
    """A JumpReLU SAE in the orientation of SAELens, input not shifted."""

    w_enc: torch.Tensor  # [d, N]
    b_enc: torch.Tensor
    w_dec: torch.Tensor  # [N, d]
    b_dec: torch.Tensor
    threshold: torch.Tensor

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Latent activations of rows *x*."""
        pre = x @ self.w_enc + self.b_enc
        return torch.relu(pre) * (pre > self.threshold)

    def decode(self, f: torch.Tensor) -> torch.Tensor:
        """Reconstruction from activations."""
        return f @ self.w_dec + self.b_dec


class Trainee(torch.nn.Module):
    """The SAE while it is trained, on input scaled to a mean norm of sqrt(d)."""

    def __init__(self, width: int, latents: int, center: torch.Tensor) -> None:
        super().__init__()
        directions = torch.nn.functional.normalize(torch.randn(latents, width), dim=1)
        self.w_dec = torch.nn.Parameter(directions.clone())
        self.w_enc = torch.nn.Parameter(directions.clone())  # [N, d], one row a latent
        self.b_enc = torch.nn.Parameter(torch.zeros(latents))
        self.b_dec = torch.nn.Parameter(center.clone())

    def pre(self, x: torch.Tensor) -> torch.Tensor:
        """Pre-activations of every latent."""
        return (x - self.b_dec) @ self.w_enc.t() + self.b_enc

    def sparse(self, x: torch.Tensor, rows: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Reconstruction of *x* from the active (row, latent) pairs alone.

        Gradients then cost what is active, not rows x latents.
        """
        look_up = torch.nn.functional.embedding
        shifted = (x - self.b_dec.detach())[rows]
        f = (shifted * look_up(latents, self.w_enc)).sum(1) + self.b_enc[latents]
        parts = f[:, None] * look_up(latents, self.w_dec)
        return torch.zeros_like(x).index_add(0, rows, parts) + self.b_dec

    @torch.no_grad()
    def project(self) -> None:
        """Keep the decoder rows at unit norm, and take out the gradient along them."""
        if self.w_dec.grad is not None:
            along = (self.w_dec.grad * self.w_dec).sum(1, keepdim=True)
            self.w_dec.grad -= along * self.w_dec

    @torch.no_grad()
    def normalise(self) -> None:
        """Decoder rows to unit norm."""
        self.w_dec.copy_(torch.nn.functional.normalize(self.w_dec, dim=1))


def output_of(value: Any) -> torch.Tensor:
    """The residual in what a decoder layer returns, a tensor or a tuple by version."""
    result: torch.Tensor = value[0] if isinstance(value, tuple) else value
    return result


def block_mask(owner: torch.Tensor) -> torch.Tensor:
    """Additive causal mask that keeps documents of a row apart."""
    same = owner[:, :, None] == owner[:, None, :]
    length = owner.shape[1]
    mask = (same & torch.ones(length, length, dtype=torch.bool).tril())[:, None]
    return torch.zeros(mask.shape).masked_fill_(~mask, torch.finfo(torch.float32).min)


def record(model: LlamaForCausalLM, layer: int, rows: Rows, tokens: int) -> torch.Tensor:
    """About *tokens* rows of the residual after *layer*, special tokens left out."""
    out: list[torch.Tensor] = []
    states: list[torch.Tensor] = []
    total = 0
    layers = model.model.layers
    handle = layers[layer].register_forward_hook(lambda _m, _a, v: states.append(output_of(v)))
    model.model.layers = layers[: layer + 1]  # nothing after the layer is needed
    bar = tqdm(total=tokens, unit="token", desc="record", mininterval=5)
    for start in range(0, len(rows.ids), 16):
        ids = rows.ids[start : start + 16].long()
        owner = rows.owner[start : start + 16].long()
        states.clear()
        with torch.no_grad():
            model.model(input_ids=ids, attention_mask=block_mask(owner), use_cache=False)
        picked = states[0][ids >= len(SPECIAL)]
        out.append(picked.clone())
        total += len(picked)
        bar.update(len(picked))
        if total >= tokens:
            break
    bar.close()
    handle.remove()
    model.model.layers = layers
    return torch.cat(out)[:tokens]


def save_state(folder: Path, net: Trainee, optimizer: torch.optim.Optimizer,
               state: dict[str, Any], extra: dict[str, torch.Tensor]) -> None:  # fmt: skip
    """Checkpoint of an SAE run; the counters are written last."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"net.{n}": p.detach().clone() for n, p in net.named_parameters()}
    for i, entry in optimizer.state_dict()["state"].items():
        tensors |= {f"opt.{i}.{k}": v.detach().clone() for k, v in entry.items()}
    tensors |= {f"extra.{k}": v.clone() for k, v in extra.items()}
    save_file(tensors, folder / "sae.st")
    write_json(folder / "state.json", state)


def load_state(folder: Path, net: Trainee, optimizer: torch.optim.Optimizer,
               extra: dict[str, torch.Tensor]) -> dict[str, Any]:  # fmt: skip
    """Restore what :func:`save_state` wrote and return the counters."""
    moments: dict[int, dict[str, torch.Tensor]] = {}
    parameters = dict(net.named_parameters())
    for key, value in load_file(folder / "sae.st").items():
        part, name = key.split(".", 1)
        if part == "net":
            with torch.no_grad():
                parameters[name].copy_(value)
        elif part == "opt":
            number, name = name.split(".", 1)
            moments.setdefault(int(number), {})[name] = value
        else:
            extra[name].copy_(value)
    full = optimizer.state_dict()
    full["state"] = moments
    optimizer.load_state_dict(full)
    state: dict[str, Any] = read_json(folder / "state.json")
    return state


def train(  # noqa: PLR0915  one loop, read from top to bottom
    data: torch.Tensor, steps: int, minutes: float | None, folder: Path
) -> tuple[Sae, int]:
    """Train on *data* [tokens, d]; return the SAE in the units of *data*, and the steps made.

    The run ends after *steps*, or after *minutes* if these are over sooner.
    """
    torch.manual_seed(SEED)
    width = data.shape[1]
    scale = width**0.5 / data.norm(dim=1).mean().item()
    center = data[torch.randperm(len(data))[:50_000]].mean(0) * scale
    net = Trainee(width, LATENTS, center)
    optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.999))
    extra = {"silent": torch.zeros(LATENTS), "cut": torch.zeros(())}
    state: dict[str, Any] = {"step": 0, "seconds": 0.0}
    if (folder / "state.json").exists():
        state = load_state(folder, net, optimizer, extra)
    silent, cut = extra["silent"], extra["cut"]
    clock, saved = Clock(state["seconds"]), state["seconds"]
    per_epoch, order = len(data) // BATCH, torch.empty(0)
    bar = tqdm(total=steps, initial=state["step"], unit="step", desc="sae", mininterval=5)
    while True:
        step = state["step"]
        progress = max(step / steps, clock.seconds / (60 * minutes) if minutes else 0.0)
        if progress >= 1:
            break
        if step % per_epoch == 0 or not len(order):
            generator = torch.Generator().manual_seed(SEED + step // per_epoch)
            order = torch.randperm(len(data), generator=generator)
        at = (step % per_epoch) * BATCH
        x = data[order[at : at + BATCH]] * scale
        rate = min(1.0, (step + 1) / 100, 4 * (1 - progress))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate
        with torch.no_grad():  # the cut of the batch is estimated on every eighth row
            pre = net.pre(x)
            active = max(ACTIVE, int(2 * ACTIVE * (1 - step / 300)))  # sparser and sparser
            level = pre[::8].flatten().topk(active * len(pre[::8])).values[-1].clamp_min(1e-3)
            cut.copy_(level if step < 300 else 0.99 * cut + 0.01 * level)
            on, latents = (pre > level).nonzero(as_tuple=True)
            silent.add_(1)
            silent[latents] = 0
        error = x - net.sparse(x, on, latents)
        loss = error.pow(2).sum(1).mean() / width
        dead = (silent > DEAD_AFTER).nonzero().flatten()
        if len(dead):  # the dead learn what is left over
            few = x[:256]
            rest = (few - net.b_dec.detach()) @ net.w_enc[dead].t() + net.b_enc[dead]
            top = rest.topk(min(64, len(dead)), dim=1)
            spare = torch.zeros_like(rest).scatter(1, top.indices, torch.relu(top.values))
            miss = (error[:256].detach() - spare @ net.w_dec[dead]).pow(2).sum(1).mean() / width
            loss = loss + AUX * miss
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        net.project()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        net.normalise()
        state["step"] += 1
        state["seconds"] = clock.seconds
        if step % 50 == 0:
            l0 = len(on) / len(x)
            bar.set_postfix(loss=f"{loss.item():.4f}", l0=f"{l0:.1f}", dead=len(dead))
        bar.update()
        if clock.seconds - saved > SAVE_EVERY:
            save_state(folder, net, optimizer, state, extra)
            saved = clock.seconds
    bar.close()
    save_state(folder, net, optimizer, state, extra)
    with torch.no_grad():  # back to the units of the data; the shift by b_dec goes into b_enc
        done = Sae(
            w_enc=net.w_enc.detach().t().contiguous(),
            b_enc=(net.b_enc - net.w_enc @ net.b_dec).detach() / scale,
            w_dec=net.w_dec.detach().clone(),
            b_dec=net.b_dec.detach() / scale,
            threshold=torch.full((LATENTS,), float(cut) / scale),
        )
    return done, state["step"]


def save_sae(sae: Sae, layer: int, out: Path) -> None:
    """Write the SAE as SAELens does for a JumpReLU SAE."""
    out.mkdir(parents=True, exist_ok=True)
    save_file(
        {"W_enc": sae.w_enc.contiguous(), "b_enc": sae.b_enc, "W_dec": sae.w_dec.contiguous(),
         "b_dec": sae.b_dec, "threshold": sae.threshold},
        out / "sae_weights.safetensors",
    )  # fmt: skip
    width, latents = sae.w_enc.shape
    write_json(out / "cfg.json", {
        "d_in": width, "d_sae": latents, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": False, "normalize_activations": "none",
        "reshape_activations": "none", "architecture": "jumprelu",
        "metadata": {
            "model_name": "saeguard-demo", "hook_name": f"blocks.{layer}.hook_resid_post",
            "hook_head_index": None, "prepend_bos": True, "context_size": LENGTH,
            "exclude_special_tokens": list(range(len(SPECIAL))),
        },
    })  # fmt: skip


def load_sae(folder: Path) -> tuple[Sae, int]:
    """Read a saved SAE and the layer it belongs to."""
    t = load_file(folder / "sae_weights.safetensors")
    hook = read_json(folder / "cfg.json")["metadata"]["hook_name"]
    sae = Sae(t["W_enc"], t["b_enc"], t["W_dec"], t["b_dec"], t["threshold"])
    return sae, int(hook.split(".")[1])


def spliced_loss(model: LlamaForCausalLM, layer: int, rows: Rows, how: str, sae: Sae) -> float:
    """Next-token loss with the residual after *layer* left, reconstructed or zeroed."""
    total, count = 0.0, 0
    current: list[torch.Tensor] = []

    def hook(_module: torch.nn.Module, _args: Any, value: Any) -> Any:
        x = output_of(value)
        keep = (current[0] < len(SPECIAL))[..., None]
        new = torch.where(keep, x, torch.zeros_like(x) if how == "zero" else
                          sae.decode(sae.encode(x)))  # fmt: skip
        return (new, *value[1:]) if isinstance(value, tuple) else new

    handle = model.model.layers[layer].register_forward_hook(hook) if how != "clean" else None
    for start in range(0, len(rows.ids), 16):
        ids, owner = rows.ids[start : start + 16].long(), rows.owner[start : start + 16].long()
        current[:] = [ids]
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=block_mask(owner), use_cache=False).logits
        known = (owner[:, 1:] == owner[:, :-1]) & (owner[:, 1:] > 0)
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"
        )
        total += float(losses[known].sum())
        count += int(known.sum())
    if handle:
        handle.remove()
    return total / count


def measure(model: LlamaForCausalLM, layer: int, sae: Sae, held: Rows, data: torch.Tensor
            ) -> dict[str, Any]:  # fmt: skip
    """L0, explained variance, dead latents and loss recovered."""
    test = record(model, layer, held, 10**9)
    with torch.no_grad():
        f = sae.encode(test)
        error = (test - sae.decode(f)).pow(2).sum()
        spread = (test - test.mean(0)).pow(2).sum()
        fired = torch.zeros(sae.w_enc.shape[1], dtype=torch.bool)
        used = 0
        for part in torch.split(data[:300_000], 8192):
            fired |= (sae.encode(part) > 0).any(0)
            used += len(part)
    losses = {h: spliced_loss(model, layer, held, h, sae) for h in ("clean", "sae", "zero")}
    recovered = (losses["zero"] - losses["sae"]) / (losses["zero"] - losses["clean"])
    return {
        "layer": layer, "latents": sae.w_enc.shape[1], "width": sae.w_enc.shape[0],
        "l0": round((f > 0).sum(1).float().mean().item(), 2),
        "explained_variance": round(1 - float(error / spread), 4),
        "dead_latents": int((~fired).sum()), "dead_measured_on_tokens": used,
        "threshold": round(float(sae.threshold[0]), 6),
        "loss_clean": round(losses["clean"], 4), "loss_with_sae": round(losses["sae"], 4),
        "loss_zero_ablated": round(losses["zero"], 4), "loss_recovered": round(recovered, 4),
        "held_out_tokens": len(test), "training_tokens": len(data), "seed": SEED,
    }  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--minutes", type=float, help="stop after that time if it is sooner")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--corpus", type=Path, default=WORK_DIR / "model")
    parser.add_argument("--work", type=Path, help="checkpoints (demo/.work/sae-LAYER)")
    parser.add_argument("--out", type=Path, default=SAE_DIR)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    work: Path = args.work or WORK_DIR / f"sae-{args.layer}"
    _, rows = prepare(args.corpus)
    held = Rows(rows.ids[:VALIDATION_ROWS], rows.owner[:VALIDATION_ROWS])
    rows = Rows(rows.ids[VALIDATION_ROWS:], rows.owner[VALIDATION_ROWS:])
    model = LlamaForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    data = record(model, args.layer, rows, args.tokens)
    clock = Clock()
    sae, steps = train(data, args.steps, args.minutes, work)
    save_sae(sae, args.layer, args.out)
    metrics = measure(model, args.layer, sae, held, data)
    metrics |= {"steps": steps, "batch": BATCH, "k": ACTIVE, "seconds": round(clock.seconds)}
    write_json(args.out / "metrics.json", metrics)
    print(metrics)


if __name__ == "__main__":
    main()
