"""What each latent at each token of a prompt does to a difference of logits.

Gradient times activation is the first-order estimate (attribution patching, Syed et al. 2023,
arXiv:2310.10348; on latents Marks et al. 2024, arXiv:2403.19647). Integrated gradients
(Sundararajan et al. 2017, arXiv:1703.01365) average the gradient on the way from the prompt without
any latent, only the SAE's error, to the prompt as it is: their effects add up to the whole
difference. Ablation takes a latent's part out of the residual and measures. An effect is by how
much the latent's being there raises the difference:

    f * (W_dec @ gradient) / scale        metric(x) - metric(x - f * W_dec / scale)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from saeguard.hf.model import LanguageModel
from saeguard.hf.on_prompt import OnPrompt
from saeguard.hf.residuals import on_output
from saeguard.sae import SaeInfo, read_decoder_rows
from saeguard.sae.encoder import token_scale

BATCH = 8
"""Copies of the prompt in one forward pass."""


@dataclass(frozen=True, slots=True)
class Target:
    """The token that may follow the prompt, and the one it is compared with."""

    token: int
    against: int | None = None
    """None: the token's log-probability in place of a difference of logits."""

    def metric(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the difference [n] of logits [n, vocabulary] of the next token."""
        logits = logits.float()
        if self.against is None:
            return logits.log_softmax(-1)[:, self.token]
        return logits[:, self.token] - logits[:, self.against]


@dataclass(frozen=True, slots=True)
class Effects:
    """The effect of each latent at each token on which it fires."""

    token: np.ndarray
    """[entries] as the prompt's own."""
    latent: np.ndarray
    value: np.ndarray
    """[entries] activations."""
    effect: np.ndarray
    """[entries] float64, in logits (nats of log-probability without `against`)."""
    metric: float
    """Of the prompt as it is."""

    def by_latent(self) -> dict[int, float]:
        """Return each latent's effect, added up over the tokens, the largest first."""
        latents, index = np.unique(self.latent, return_inverse=True)
        total = np.bincount(index, weights=self.effect, minlength=len(latents))
        order = np.argsort(-np.abs(total), kind="stable")
        return {int(latents[i]): float(total[i]) for i in order}


def attribute_prompt(
    lm: LanguageModel, info: SaeInfo, prompt: OnPrompt, target: Target, *, steps: int = 0
) -> Effects:
    """Return the estimated effect of every latent at every token.

    Args:
        lm: the model.
        info: its SAE.
        prompt: of this model and SAE.
        target: what is to follow.
        steps: gradients to average on the way from no latent at all; 0 for the gradient at the
            prompt as it is.
    """
    if not len(prompt.latent):
        plain = float(_metrics(lm, info, prompt, target, [prompt.x])[0])
        return Effects(prompt.token, prompt.latent, prompt.value, np.empty(0), plain)
    rows, parts = _parts(info, prompt)
    away = torch.zeros_like(prompt.x).index_add_(0, torch.from_numpy(prompt.token), parts)
    shares = [1.0] if not steps else [(k + 0.5) / steps for k in range(steps)]
    gradient = torch.zeros_like(prompt.x)
    for start in range(0, len(shares), BATCH):
        some = shares[start : start + BATCH]
        gradient += _gradients(lm, info, prompt, target, [prompt.x - (1 - s) * away for s in some])
    gradient /= len(shares)
    along = (rows * gradient[prompt.token]).sum(1).double()
    effect = torch.from_numpy(prompt.value).double() * along
    plain = float(_metrics(lm, info, prompt, target, [prompt.x])[0])
    return Effects(prompt.token, prompt.latent, prompt.value, effect.numpy(), plain)


def ablate(
    lm: LanguageModel,
    info: SaeInfo,
    prompt: OnPrompt,
    target: Target,
    latents: Sequence[int],
    done: Callable[[int], object] = lambda _count: None,
) -> dict[int, float]:
    """Return what each latent does by itself: it is taken out at every token, and measured.

    Args:
        lm: the model.
        info: its SAE.
        prompt: of this model and SAE.
        target: what is to follow.
        latents: to be taken out, one at a time; one that does not fire has no effect.
        done: called with the number of latents since the last call.
    """
    (plain,) = _metrics(lm, info, prompt, target, [prompt.x])
    _, parts = _parts(info, prompt)
    out: dict[int, float] = {}
    for start in range(0, len(latents), BATCH):
        some = latents[start : start + BATCH]
        edited = []
        for latent in some:
            of = np.flatnonzero(prompt.latent == latent)
            at = torch.from_numpy(prompt.token[of])
            edited.append(prompt.x.index_add(0, at, parts[torch.from_numpy(of)], alpha=-1))
        measured = _metrics(lm, info, prompt, target, edited)
        out |= {latent: float(plain - value) for latent, value in zip(some, measured, strict=True)}
        done(len(some))
    return out


def correlation(estimated: Sequence[float], measured: Sequence[float]) -> dict[str, float | None]:
    """Return Pearson's and Spearman's correlation; None if there are too few values, or one."""
    from scipy import stats  # noqa: PLC0415 - takes a second

    if len(set(estimated)) < 2 or len(set(measured)) < 2:  # noqa: PLR2004 - a line has two points
        return {"pearson": None, "spearman": None}
    return {
        "pearson": round(float(stats.pearsonr(estimated, measured).statistic), 4),
        "spearman": round(float(stats.spearmanr(estimated, measured).statistic), 4),
    }


def _parts(info: SaeInfo, prompt: OnPrompt) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each entry its decoder row over the token's scale, and that times activation."""
    latents, index = np.unique(prompt.latent, return_inverse=True)
    rows = read_decoder_rows(info, latents.tolist())[torch.from_numpy(index)]
    scale = token_scale(info.norm, prompt.x)
    if scale is not None:
        rows = rows / scale[torch.from_numpy(prompt.token)]
    return rows, rows * torch.from_numpy(prompt.value)[:, None]


@torch.no_grad()
def _metrics(
    lm: LanguageModel,
    info: SaeInfo,
    prompt: OnPrompt,
    target: Target,
    residuals: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Return the metric [n] with the SAE's layer giving each of the residuals [T, d_in]."""
    x = torch.stack(list(residuals)).to(lm.model.device, lm.model.dtype)
    return target.metric(_logits(lm, info, prompt, x)).double().cpu()


def _gradients(
    lm: LanguageModel,
    info: SaeInfo,
    prompt: OnPrompt,
    target: Target,
    residuals: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Return the gradient of the metric, added up over the residuals, [T, d_in] float32."""
    x = torch.stack(list(residuals)).to(lm.model.device, lm.model.dtype).requires_grad_()
    with torch.enable_grad():
        total = target.metric(_logits(lm, info, prompt, x)).sum()
    (gradient,) = torch.autograd.grad(total, [x])
    return gradient.float().sum(0).cpu()


def _logits(lm: LanguageModel, info: SaeInfo, prompt: OnPrompt, x: torch.Tensor) -> torch.Tensor:
    ids = torch.tensor([prompt.text.tokens] * len(x), device=lm.model.device)
    with on_output(lm, info.layer, lambda _x: x):
        logits: torch.Tensor = lm.model(input_ids=ids, use_cache=False).logits
    return logits[:, -1]
