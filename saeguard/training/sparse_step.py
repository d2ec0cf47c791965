"""SAELens' BatchTopK SAE with a training step that computes only with latents that fire.

The loss and its gradients are SAELens' own up to rounding; tests compare them. A dense step
multiplies [rows, d_sae] matrices six times, though `k` of thousands of latents fire on a row. Here
one product remains, the pre-activations. The cost of everything after it, gradients included, grows
with the number of latents that fire.
"""

from __future__ import annotations

from typing import Any

import torch
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput

LOOSE = (0.9, 0.7, 0.0)
"""Shares of the last threshold above which the largest activations are searched, in turn."""


class SparseBatchTopK(BatchTopKTrainingSAE):  # type: ignore[misc]
    """A BatchTopK SAE for training on a CPU."""

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Return losses, reconstruction and, as a sparse tensor, activations."""
        x = step_input.sae_in
        with torch.no_grad():
            norms = self.W_dec.norm(dim=-1)
            z = torch.addmm(self.b_enc, x - self.b_dec, self.W_enc).mul_(norms)
            rows, latents = self._largest(z, int(self.cfg.k * len(x)))
            fired = z[rows, latents]
        pre = fired / norms[latents]
        active: Any = _Active.apply
        total: Any = _Sum.apply
        acts = active(x - self.b_dec, self.W_enc, self.b_enc, pre, rows, latents)
        y = total(acts, self.W_dec, rows, latents, len(x)) + self.b_dec
        losses = {"mse_loss": (y - x).pow(2).sum(-1).mean()}
        losses["auxiliary_reconstruction_loss"] = self._revive(step_input, y)
        with torch.no_grad():
            sparse = torch.sparse_coo_tensor(
                torch.stack([rows, latents]),
                fired,
                z.shape,
                is_coalesced=True,
                check_invariants=False,
            )
            self.update_topk_threshold(fired)
        return TrainStepOutput(
            sae_in=x,
            sae_out=y,
            feature_acts=sparse,
            hidden_pre=z,
            loss=losses["mse_loss"] + losses["auxiliary_reconstruction_loss"],
            losses=losses,
        )

    def _largest(self, z: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return row and latent of the `count` largest positive entries of `z`, row by row."""
        flat = z.flatten()
        last = float(self.topk_threshold)
        for share in LOOSE if last > 0 else (0.0,):
            at = (flat > share * last).nonzero().flatten()
            if len(at) >= count:
                break
        if len(at) > count:
            at = at[flat[at].topk(count, sorted=False).indices].sort().values
        return at // z.shape[1], at % z.shape[1]

    def _revive(self, step_input: TrainStepInput, y: torch.Tensor) -> torch.Tensor:
        """Return SAELens' auxiliary loss, computed for dead latents alone."""
        dead = step_input.dead_neuron_mask
        if dead is None or not bool(dead.any()):
            return y.new_tensor(0.0)
        at = dead.nonzero().flatten()
        x = step_input.sae_in
        W_dec = self.W_dec[at]
        pre = (x - self.b_dec) @ self.W_enc[:, at] + self.b_enc[at]
        k = x.shape[-1] // 2
        top = (pre * W_dec.norm(dim=-1)).topk(min(k, len(at)), dim=-1, sorted=False)
        acts = torch.zeros_like(pre).scatter(-1, top.indices, top.values)
        guess = (acts / W_dec.norm(dim=-1)) @ W_dec
        miss = (guess - (x - y).detach()).pow(2).sum(-1).mean()
        loss: torch.Tensor = self.cfg.aux_loss_coefficient * min(len(at) / k, 1.0) * miss
        return loss


class _Active(torch.autograd.Function):
    """Return known pre-activations `x[row] @ W[:, latent] + b[latent]`, and define gradients."""

    @staticmethod
    def forward(ctx: Any, x: Any, W: Any, _b: Any, pre: Any, rows: Any, latents: Any) -> Any:
        ctx.save_for_backward(x, W, rows, latents)
        return pre.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, W, rows, latents = ctx.saved_tensors
        by_latent = _csr(grads[0], rows, latents, (len(x), W.shape[1]), transposed=True)
        b = torch.zeros(W.shape[1]).index_add_(0, latents, grads[0])
        # x is a constant less b_dec, so that only the sum of its gradient over rows is wanted.
        shift = (W @ b / len(x)).expand(len(x), -1)
        return shift, (by_latent @ x).t(), b, None, None, None


class _Sum(torch.autograd.Function):
    """Return, for each row, the weighted sum of the decoder rows of its latents."""

    @staticmethod
    def forward(ctx: Any, acts: Any, W: Any, rows: Any, latents: Any, count: int) -> Any:
        ctx.save_for_backward(acts, W, rows, latents)
        return _csr(acts, rows, latents, (count, len(W)), transposed=False) @ W

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        acts, W, rows, latents = ctx.saved_tensors
        by_latent = _csr(acts, rows, latents, (len(grads[0]), len(W)), transposed=True)
        # All products are cheaper than those of the pairs, whose rows would have to be gathered.
        acts_grad = (grads[0] @ W.t())[rows, latents]
        return acts_grad, by_latent @ grads[0], None, None, None


def _csr(
    values: torch.Tensor,
    rows: torch.Tensor,
    latents: torch.Tensor,
    shape: tuple[int, int],
    *,
    transposed: bool,
) -> torch.Tensor:
    """Return a sparse matrix of `shape`, or its transpose; the pairs are sorted by row."""
    if transposed:
        order = latents.argsort(stable=True)
        values, rows, latents = values[order], latents[order], rows[order]
        shape = shape[1], shape[0]
    starts = torch.bincount(rows, minlength=shape[0]).cumsum(0)
    starts = torch.cat([starts.new_zeros(1), starts])
    return torch.sparse_csr_tensor(starts, latents, values, shape, check_invariants=False)
