"""Rank latents by what they contribute to preferring one completion over another.

A latent that fires with a behaviour need not cause it. The gradient of a completion's
log-probability with respect to the residual says, to first order, what an edit of each latent would
change: attribution patching (Nanda 2023; Syed et al. 2023, arXiv:2310.10348), on SAE latents as in
Marks et al. 2024, arXiv:2403.19647. With `g[t]` the gradient at token `t`:

    ablate: sum_t -f[t] * (W_dec @ g[t])        raise: sum_t (height - f[t]) * (W_dec @ g[t])

`height` is the latent's mean activation where it fires. First-order estimates mislead for large
edits, so the best are tried: the edit is made and the log-probabilities are measured, on texts of
other templates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from saeguard.effect.prompts import Prompt, completion_of, tokens_of
from saeguard.hf.model import LanguageModel
from saeguard.hf.residuals import batches, on_output, padded
from saeguard.sae import SaeInfo, activate, read_block, read_decoder_rows, read_rows
from saeguard.sae.encoder import token_scale

BATCH_TOKENS = 2048
Change = Callable[[torch.Tensor], torch.Tensor]
How = Literal["ablate", "raise"]


@dataclass(frozen=True, slots=True)
class Scored:
    """A prompt's tokens with those of its completion."""

    tokens: tuple[int, ...]
    prompt_tokens: int
    label: int
    question: str
    template: str


@dataclass(frozen=True, slots=True)
class Attribution:
    """First-order effects on `log p(label 1) - log p(label 0)`, per token of the completions."""

    ablate: np.ndarray
    """[templates, d_sae]"""
    raise_: np.ndarray
    """[templates, d_sae]"""
    height: np.ndarray
    """[d_sae] mean activation where the latent fires."""
    rate: np.ndarray
    """[d_sae] share of tokens on which it fires."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A latent with an edit, and its effect as estimated."""

    latent: int
    how: How
    predicted: float
    """Nats per token by which label 1 gains on label 0."""
    z: float
    """The estimate over its standard error across templates."""
    height: float
    rate: float


@dataclass(frozen=True, slots=True)
class Effect:
    """What an edit did to the log-probabilities of completions, in nats per token."""

    change: np.ndarray
    """[templates] by how much label 1 gains on label 0."""
    loss: float
    """By how much the loss on all completions grows."""


def read_scored(lm: LanguageModel, prompts: Sequence[Prompt], longest: int) -> list[Scored]:
    """Tokenise; texts that are too long and questions with one label are left out."""
    found = []
    for prompt in prompts:
        before = tokens_of(prompt, lm.tokenizer)
        after = completion_of(prompt, lm.tokenizer)
        if after and len(before) + len(after) <= longest:
            found.append(
                Scored(
                    (*before, *after), len(before), prompt.label, prompt.question, prompt.template
                )
            )
    labels: dict[str, set[int]] = {}
    for text in found:
        labels.setdefault(text.question, set()).add(text.label)
    return [text for text in found if len(labels[text.question]) > 1]


def attribute(
    lm: LanguageModel,
    info: SaeInfo,
    texts: Sequence[Scored],
    excluded: Sequence[int],
    done: Callable[[int], object],
) -> Attribution:
    """Return the first-order effect of every latent, averaged over the texts of a template.

    Args:
        lm: the model.
        info: its SAE, whose latents do not compete.
        texts: with both labels for each question.
        excluded: token ids that no clamp edits.
        done: called with the number of texts read since the last call.
    """
    names = sorted({t.template for t in texts})
    rows = read_block(info, 0, info.d_sae)
    W_dec = read_decoder_rows(info, list(range(info.d_sae)))
    ablated = torch.zeros(len(texts), info.d_sae)
    pushed = torch.zeros(len(texts), info.d_sae)
    total, count = torch.zeros(info.d_sae), torch.zeros(info.d_sae)
    tokens = 0
    for i, x, g in _gradients(lm, info.layer, texts):
        kept = torch.from_numpy(~np.isin(np.array(texts[i].tokens), np.array(excluded)))
        f = activate(rows, x[kept], info.norm)
        along = g[kept] @ W_dec.t()
        ablated[i] = -(f * along).sum(0)
        pushed[i] = along.sum(0)
        total += f.sum(0)
        count += (f > 0).sum(0)
        tokens += len(f)
        done(1)
    height = total / count.clamp(min=1)
    raised = pushed * height + ablated
    weights = torch.from_numpy(_contrast(texts, names)).float()
    return Attribution(
        (weights @ ablated).numpy(),
        (weights @ raised).numpy(),
        height.numpy(),
        (count / max(1, tokens)).numpy(),
    )


def candidates(found: Attribution, most: int, *, least_rate: float = 1e-4) -> list[Candidate]:
    """Return the latents whose edit lowers the preference for label 1 most surely.

    Ranked by the estimate over its standard error: one text with a huge gradient is no finding.
    """
    out = []
    sides: tuple[tuple[How, np.ndarray], ...] = (("ablate", found.ablate), ("raise", found.raise_))
    for how, values in sides:
        mean = values.mean(0)
        error = values.std(0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.abs(mean)
        z = np.divide(mean, error, out=np.zeros_like(mean), where=error > 0)
        z[found.rate < least_rate] = 0
        # By the estimate among those that are sure: a sure effect of nothing is of no use.
        sure = np.where(z < -2, mean, 0)  # noqa: PLR2004 - about 95 %
        out += [
            Candidate(
                j, how, float(mean[j]), float(z[j]), float(found.height[j]), float(found.rate[j])
            )
            for j in np.argsort(sure, kind="stable")[:most].tolist()
            if sure[j] < 0
        ]
    return out


def try_edit(
    lm: LanguageModel,
    info: SaeInfo,
    texts: Sequence[Scored],
    targets: Mapping[int, float],
    excluded: Sequence[int],
    plain: np.ndarray,
) -> Effect:
    """Set latents to `targets` at every token, and measure the log-probabilities.

    Args:
        lm: the model.
        info: its SAE.
        texts: as `attribute`.
        targets: activation of each latent.
        excluded: token ids that are not edited.
        plain: [texts] log-probabilities per token without the edit.
    """
    change = setting(info, targets, lm.model.device)
    edited = log_probabilities(lm, texts, info.layer, change, excluded)
    names = sorted({t.template for t in texts})
    return Effect(_contrast(texts, names) @ (edited - plain), float((plain - edited).mean()))


def setting(info: SaeInfo, targets: Mapping[int, float], device: torch.device) -> Change:
    """Return the edit that sets latents to `targets`; it adds along their decoder rows only."""
    latents = list(targets)
    rows, W_dec = read_rows(info, latents).to(device), read_decoder_rows(info, latents).to(device)
    wanted = torch.tensor([*targets.values()], dtype=torch.float32, device=device)

    def change(x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1]).float()
        f, scale = activate(rows, flat, info.norm), token_scale(info.norm, flat)
        delta = wanted - f if scale is None else (wanted - f) / scale
        return x + (delta @ W_dec).reshape(x.shape).to(x.dtype)

    return change


@torch.no_grad()
def log_probabilities(
    lm: LanguageModel,
    texts: Sequence[Scored],
    layer: int,
    change: Change | None = None,
    excluded: Sequence[int] = (),
) -> np.ndarray:
    """Return the mean log-probability of each completion's tokens, [texts] float64."""
    out = np.empty(len(texts))
    for batch in batches([len(t.tokens) for t in texts], BATCH_TOKENS):
        ids, mask = padded([texts[i].tokens for i in batch])
        looked = ~np.isin(ids.numpy(), np.array(excluded, np.int64))
        ids, mask = ids.to(lm.model.device), mask.to(lm.model.device)
        kept = torch.from_numpy(looked).to(lm.model.device)

        def edit(x: torch.Tensor, kept: torch.Tensor = kept) -> torch.Tensor:
            return x if change is None else torch.where(kept[..., None], change(x), x)

        with on_output(lm, layer, edit):
            logits = lm.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        out[batch] = [float(_mean_logp(logits[row], texts[i])) for row, i in enumerate(batch)]
    return out


def _mean_logp(logits: torch.Tensor, text: Scored) -> torch.Tensor:
    end = len(text.tokens)
    taken = torch.tensor(text.tokens[text.prompt_tokens : end], device=logits.device)
    rows = logits[text.prompt_tokens - 1 : end - 1].float()
    return rows.log_softmax(-1).gather(-1, taken[:, None]).mean()


def _gradients(
    lm: LanguageModel, layer: int, texts: Sequence[Scored]
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield each text's residuals and their gradient, [tokens, d_in] float32 each."""
    for parameter in lm.model.parameters():
        parameter.requires_grad_(False)
    for batch in batches([len(t.tokens) for t in texts], BATCH_TOKENS):
        ids, mask = (part.to(lm.model.device) for part in padded([texts[i].tokens for i in batch]))
        kept: list[torch.Tensor] = []

        def leaf(x: torch.Tensor, kept: list[torch.Tensor] = kept) -> torch.Tensor:
            kept.append(x.detach().requires_grad_())  # the layers below need no gradient
            return kept[0]

        with torch.enable_grad(), on_output(lm, layer, leaf):
            logits = lm.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            # Texts do not see each other, so one sum gives each its own gradient.
            loss = torch.stack(
                [_mean_logp(logits[row], texts[i]) for row, i in enumerate(batch)]
            ).sum()
        (gradient,) = torch.autograd.grad(loss, kept)
        for row, i in enumerate(batch):
            end = len(texts[i].tokens)
            yield i, kept[0][row, :end].detach().float().cpu(), gradient[row, :end].float().cpu()


def _contrast(texts: Sequence[Scored], names: Sequence[str]) -> np.ndarray:
    """Return [templates, texts] weights: the mean of label 1 minus that of label 0, by question."""
    questions: dict[str, list[int]] = {}
    for i, text in enumerate(texts):
        questions.setdefault(text.question, []).append(i)
    at = {name: i for i, name in enumerate(names)}
    share = np.zeros(len(names))
    for members in questions.values():
        share[at[texts[members[0]].template]] += 1
    out = np.zeros((len(names), len(texts)))
    for members in questions.values():
        row = at[texts[members[0]].template]
        for label, sign in ((1, 1.0), (0, -1.0)):
            same = [i for i in members if texts[i].label == label]
            out[row, same] = sign / len(same) / share[row]
    return out
