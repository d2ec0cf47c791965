"""Judge texts on a Hugging Face model with the guard's rules, one whole text at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from saeguard.guard.compiled_rules import Rules
from saeguard.guard.judge import Scored, judge_text, score_text
from saeguard.guard.request_verdicts import Verdicts
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


class Seen(NamedTuple):
    """What the rules judge one text by."""

    text: int
    """Index of the text."""
    shares: np.ndarray
    """[tokens, features] float32."""
    evaluable: np.ndarray
    """[tokens] bool: false for tokens that are excluded by id."""
    massive: np.ndarray
    """[tokens] bool: true for attention sinks."""
    prompt_tokens: int
    roles: np.ndarray | None
    """[prompt tokens] role of each; None if no policy needs them."""
    residuals: Mapping[int, torch.Tensor]
    """By layer, [tokens, d] float32."""

    def judge(self, rules: Rules) -> Verdicts:
        """Return one verdict per policy."""
        return judge_text(rules, *self._judged)

    def score(self, rules: Rules) -> Scored:
        """Return evidence and score of each token."""
        return score_text(rules, *self._judged)

    @property
    def _judged(self) -> tuple[np.ndarray, np.ndarray, int, np.ndarray | None, np.ndarray]:
        return self.shares, self.evaluable, self.prompt_tokens, self.roles, self.massive


def see(lm: LanguageModel, watchlist: WatchList, texts: Sequence[Text]) -> Iterator[Seen]:
    """Yield what the rules judge each text by, shortest text first.

    Raises:
        RolesError: a policy's scope is a role that the model's chat template does not identify.
    """
    marks = role_marks_for(lm.tokenizer, watchlist)
    excluded = np.array(watchlist.exclude_tokens, np.int64)
    layers = [hook.layer for hook in watchlist.hooks]
    for i, residuals in record(lm, [t.tokens for t in texts], layers):
        read = watchlist.read(activations(watchlist, residuals))
        evaluable = ~np.isin(np.array(texts[i].tokens), excluded)
        prompt = texts[i].prompt_tokens
        roles = None if marks is None else roles_of(marks, np.array(texts[i].tokens[:prompt]))
        yield Seen(i, read.shares, evaluable, read.massive, prompt, roles, residuals)


def scan(
    lm: LanguageModel, watchlist: WatchList, texts: Sequence[Text]
) -> Iterator[tuple[int, Sequence[Verdict]]]:
    """Yield `(index of the text, one verdict per policy)`, shortest text first.

    Raises:
        RolesError: a policy's scope is a role that the model's chat template does not identify.
    """
    for seen in see(lm, watchlist, texts):
        yield seen.text, seen.judge(watchlist.rules)


def role_marks_for(tokenizer: Any, watchlist: WatchList) -> RoleMarks | None:
    """Return the role marks of the model's chat template; None if no policy needs roles.

    Policies on the output do without: marks only say whether a prompt ends with a part of the
    answer, which is in their scope.

    Raises:
        RolesError: a policy's scope is a role that the chat template does not identify.
    """
    rules = watchlist.rules
    if not (rules.by_role or rules.of_output):
        return None
    marks = role_marks_of(tokenizer)
    check_roles(watchlist, marks)
    return marks if isinstance(marks, RoleMarks) else None


def activations(watchlist: WatchList, residuals: Mapping[int, torch.Tensor]) -> np.ndarray:
    """Return activations [tokens, columns] for one text's residuals by layer, as the taps do."""
    columns = []
    for hook in watchlist.hooks:
        x = residuals[hook.layer].float()
        columns += [hook_activations(hook, x), torch.linalg.vector_norm(x, dim=1, keepdim=True)]
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
