"""Judge texts on a Hugging Face model with the guard's rules, one whole text at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from saeguard.guard.judge import judge_text
from saeguard.guard.roles.assign import RoleMarks, check_roles, roles_of
from saeguard.guard.roles.chat_template import role_marks_of
from saeguard.guard.topk import apply_topk, make_ranked, set_floor
from saeguard.guard.verdict import Verdict
from saeguard.guard.watchlist import Hook, WatchList
from saeguard.hf.model import LanguageModel
from saeguard.hf.residuals import record
from saeguard.hf.texts import Text
from saeguard.sae import EncoderRows
from saeguard.sae.encoder import column_scales, product


def scan(
    lm: LanguageModel, watchlist: WatchList, texts: Sequence[Text]
) -> Iterator[tuple[int, Sequence[Verdict]]]:
    """Yield `(index of the text, one verdict per policy)`, shortest text first.

    Raises:
        RolesError: a policy's scope is a role that the model's chat template does not identify.
    """
    marks = role_marks_for(lm, watchlist)
    excluded = np.array(watchlist.exclude_tokens, np.int64)
    layers = [hook.layer for hook in watchlist.hooks]
    for i, residuals in record(lm, [t.tokens for t in texts], layers):
        shares = watchlist.shares(activations(watchlist, residuals))
        evaluable = ~np.isin(np.array(texts[i].tokens), excluded)
        prompt = texts[i].prompt_tokens
        roles = None if marks is None else roles_of(marks, np.array(texts[i].tokens[:prompt]))
        yield i, judge_text(watchlist.rules, shares, evaluable, prompt, roles)


def role_marks_for(lm: LanguageModel, watchlist: WatchList) -> RoleMarks | None:
    """Return the role marks of the model's chat template; None if no policy needs roles.

    Raises:
        RolesError: a policy's scope is a role that the chat template does not identify.
    """
    if not watchlist.rules.by_role:
        return None
    marks = role_marks_of(lm.tokenizer)
    check_roles(watchlist, marks)
    assert isinstance(marks, RoleMarks)
    return marks


def activations(watchlist: WatchList, residuals: Mapping[int, torch.Tensor]) -> np.ndarray:
    """Return activations [tokens, columns] for one text's residuals by layer."""
    columns = [hook_activations(hook, residuals[hook.layer]) for hook in watchlist.hooks]
    return torch.cat(columns, 1).numpy()


def hook_activations(hook: Hook, x: torch.Tensor) -> torch.Tensor:
    """Return [tokens, rows of the hook] float32 for `x` [tokens, d_in]."""
    x = x.float()
    rows = EncoderRows(hook.W, hook.b, hook.theta)
    ranked = [make_ranked(part, rows, x.device) for part in hook.ranked]
    floor = hook.theta.clone()
    for part in ranked:
        set_floor(part, floor)
    pre = product(rows, x, column_scales(hook.norm, x))
    f = pre * (pre > floor)
    for part in ranked:
        apply_topk(part, x, f)
    return f
