"""Clamp a Hugging Face model: the plain reference for clamps inside vLLM's forward pass.

On the tokens that a clamp policy edits, each clamped latent gets its edited value:
`x' = x + sum_j (edited_j - f_j) * W_dec[j]`. That keeps the part of `x` that the SAE does not
explain (Templeton et al. 2024, "Scaling Monosemanticity").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

from saeguard.features.massive import is_massive
from saeguard.guard.judge import clamped_tokens
from saeguard.guard.roles.assign import roles_of
from saeguard.guard.watchlist import ClampRows, WatchList
from saeguard.hf.model import LanguageModel
from saeguard.hf.residuals import on_output
from saeguard.hf.scan import hook_activations, role_marks_for
from saeguard.sae.encoder import column_scales


@contextmanager
def clamped(
    lm: LanguageModel, watchlist: WatchList, tokens: Sequence[int], prompt_tokens: int
) -> Iterator[None]:
    """Enforce the clamps of `watchlist` while `tokens` run as one sequence without a cache."""
    marks = role_marks_for(lm.tokenizer, watchlist)
    roles = None if marks is None else roles_of(marks, np.array(tokens[:prompt_tokens]))
    with ExitStack() as stack:
        for rows in watchlist.clamps:
            change = _change(watchlist, rows, tokens, prompt_tokens, roles)
            stack.enter_context(on_output(lm, rows.layer, change))
        yield


@torch.no_grad()
def greedy(
    lm: LanguageModel,
    watchlist: WatchList,
    prompt: Sequence[int],
    max_tokens: int,
    stop_tokens: Sequence[int] = (),
) -> list[int]:
    """Return the likeliest tokens under the clamps; each one computes the whole text anew."""
    out: list[int] = []
    while len(out) < max_tokens and not (out and out[-1] in stop_tokens):
        tokens = [*prompt, *out]
        with clamped(lm, watchlist, tokens, len(prompt)):
            logits = lm.model(input_ids=torch.tensor([tokens]), use_cache=False).logits
        out.append(int(logits[0, -1].argmax()))
    return out


def _change(
    watchlist: WatchList,
    rows: ClampRows,
    tokens: Sequence[int],
    prompt_tokens: int,
    roles: np.ndarray | None,
) -> Callable[[torch.Tensor], torch.Tensor]:
    hook = next(h for h in watchlist.hooks if h.layer == rows.layer)
    columns = slice(hook.first_column, hook.first_column + hook.W.shape[0])
    evaluable = ~np.isin(np.array(tokens), np.array(watchlist.exclude_tokens, np.int64))

    def change(x: torch.Tensor) -> torch.Tensor:
        f = hook_activations(hook, x[0])
        watched = np.zeros((len(tokens), watchlist.columns), np.float32)
        watched[:, columns] = f.numpy()
        shares = watchlist.shares(watched)
        massive = is_massive(x[0].float().norm(dim=1).numpy(), hook.max_norm)
        acted = np.zeros((len(tokens), len(rows.policies)), bool)
        for local, i in enumerate(rows.policies):
            if watchlist.policies[i].mode == "enforce":
                acted[:, local] = clamped_tokens(
                    watchlist.rules, i, shares, evaluable, prompt_tokens, roles, massive
                )
        on = torch.from_numpy(acted)[:, list(rows.owner)]
        mine = f[:, list(rows.columns)]
        wanted = rows.edited(mine) - mine
        scale = column_scales(hook.norm, x[0].float())
        if scale is not None:
            wanted = wanted / scale[:, list(rows.columns)]
        return x + torch.where(on, wanted, 0.0) @ rows.W_dec

    return change
