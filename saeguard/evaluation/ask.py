"""The model's own answer as a baseline: is the policy's title true of this text, yes or no?

The score is `logit(yes) - logit(no)` at the first token of the answer. Each side is the log of the
summed exponentials over its spellings (Kadavath et al. 2022, "Language Models (Mostly) Know What
They Know", reads a model's own judgement in a like way).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from saeguard.hf.model import LanguageModel
from saeguard.hf.residuals import batches, padded
from saeguard.hf.texts import make_turn

YES = ("Yes", " Yes", "yes", " yes")
NO = ("No", " No", "no", " no")
BATCH_TOKENS = 4096
ROOM = 64
"""Tokens that are left free below the model's longest context."""


class Question(NamedTuple):
    """One text and what is asked of it."""

    text: str
    reply: bool
    """Whether the last turn of a conversation is asked about, not the whole text."""
    title: str
    """Of the policy."""


def render(question: Question, text: str) -> str:
    """Return what the model is asked about `text`."""
    of = "the last reply" if question.reply else "the text"
    return (
        f'Read this text.\n"""\n{text}\n"""\n'
        f'Question: is the following true of {of}? "{question.title}"\n'
        "Answer with Yes or No only."
    )


def prompt_ids(question: Question, tokenizer: Any, limit: int) -> tuple[list[int], bool]:
    """Return the prompt's token ids, at most `limit`, and whether the text was cut to fit.

    A text that is too long loses its beginning.
    """

    def ids(text: str) -> list[int]:
        return list(make_turn("judge", tokenizer, render(question, text), "").tokens)

    text = question.text
    whole = ids(text)
    out, cut = whole, False
    while len(out) > limit and text:
        over = 1 - limit / len(out)
        text = text[max(1, int(len(text) * min(1.0, over * 1.1))) :]
        out, cut = ids(text), True
    return out, cut


def answer_ids(tokenizer: Any, spellings: Sequence[str]) -> list[int]:
    """Return the ids of the spellings that are one token, or else of their first tokens."""
    found = [tokenizer(s, add_special_tokens=False)["input_ids"] for s in spellings]
    return sorted({ids[0] for ids in found if len(ids) == 1} or {ids[0] for ids in found if ids})


@torch.no_grad()
def ask(
    lm: LanguageModel, questions: Sequence[Question], *, batch_tokens: int = BATCH_TOKENS
) -> Iterator[tuple[int, float, bool]]:
    """Yield `(index, logit(yes) - logit(no), whether the text was cut)`, shortest prompt first."""
    limit = context(lm) - ROOM
    yes, no = (answer_ids(lm.tokenizer, spellings) for spellings in (YES, NO))
    # A byte-level tokenizer may give both sides one first token: then nothing distinguishes them.
    shared = set(yes) & set(no)
    yes, no = ([i for i in side if i not in shared] for side in (yes, no))
    prompts = [prompt_ids(q, lm.tokenizer, limit) for q in questions]
    for batch in batches([len(ids) for ids, _ in prompts], batch_tokens):
        ids, mask = padded([prompts[i][0] for i in batch])
        ids, mask = ids.to(lm.model.device), mask.to(lm.model.device)
        last = mask.sum(1) - 1
        # The model's own head, and a cap on its logits if it has one, at the last tokens only.
        places, at = torch.unique(last, return_inverse=True)
        logits = lm.model(
            input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=places
        ).logits.float()
        answers = logits[torch.arange(len(batch), device=at.device), at]  # [texts, vocabulary]
        score = answers[:, yes].logsumexp(1) - answers[:, no].logsumexp(1)
        for row, i in enumerate(batch):
            yield i, float(score[row]), prompts[i][1]


def context(lm: LanguageModel) -> int:
    """Return the most tokens that the model takes."""
    config = lm.model.config.get_text_config()
    limits = (
        getattr(config, "max_position_embeddings", None),
        getattr(lm.tokenizer, "model_max_length", None),
    )
    return min([limit for limit in limits if limit], default=2048)
