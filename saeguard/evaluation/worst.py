"""The texts on which a policy errs most, with the evidence of each token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from saeguard.evaluation.datasets import Dataset, lines_at
from saeguard.evaluation.judging import Engine
from saeguard.hf.texts import Text, text_of

AROUND = 120
"""Tokens that are shown on each side of the one with the most evidence."""
UNFINISHED = "\ufffd"


class Piece(NamedTuple):
    """Some tokens that spell whole characters: one, unless a character takes several."""

    text: str
    evidence: float | None
    """The most of its tokens; None if the policy looks at none of them."""
    output: bool


@dataclass(frozen=True, slots=True)
class Example:
    """One text, as a policy saw it."""

    dataset: str
    id: str
    label: bool
    outcome: str
    score: float
    kind: str
    pieces: tuple[Piece, ...] = ()
    before: int = 0
    """Tokens left out before the pieces, and after them."""
    after: int = 0

    @property
    def wrong(self) -> bool:
        """Return whether the verdict contradicts the label."""
        return (self.outcome == "match") != self.label


def choose_worst(
    dataset: Dataset, score: np.ndarray, match: np.ndarray, count: int
) -> tuple[list[int], list[int]]:
    """Return the negatives with the highest scores, and the missed positives with the lowest.

    Args:
        dataset: the texts.
        score: [texts], NaN for texts that were not evaluated, which are in neither.
        match: [texts] bool.
        count: of each, at most.
    """
    order = np.argsort(score, kind="stable")
    order = order[~np.isnan(score[order])]
    negatives = [int(i) for i in order[::-1] if not dataset.label[i]]
    missed = [int(i) for i in order if dataset.label[i] and not match[i]]
    return negatives[:count], missed[:count]


def explained(
    dataset: Dataset,
    examples: Mapping[int, Sequence[tuple[int, Example]]],
    engine: Engine,
    tokenizer: Any,
) -> Iterator[tuple[int, Example]]:
    """Yield policy and example, with the evidence of each token.

    Args:
        dataset: the texts.
        examples: by text, the policies and their examples without tokens.
        engine: reads these texts again.
        tokenizer: the model's.
    """
    wanted = np.zeros(len(dataset), bool)
    wanted[list(examples)] = True
    lines = list(lines_at(dataset, wanted))
    texts = [text_of(dataset.path, number, line, tokenizer) for _, number, line in lines]
    for judged in engine(texts, True):
        assert judged.evidence is not None
        for policy, example in examples[lines[judged.text][0]]:
            yield (
                policy,
                _with_tokens(example, texts[judged.text], judged.evidence[:, policy], tokenizer),
            )


def _with_tokens(example: Example, text: Text, evidence: np.ndarray, tokenizer: Any) -> Example:
    looked = np.isfinite(evidence)
    # Without any evidence the end of the text is shown, where output is.
    peak = int(np.argmax(evidence)) if looked.any() else len(evidence) - 1
    start, end = max(0, peak - AROUND), min(len(evidence), peak + AROUND + 1)
    pieces = pieces_of(text, evidence, tokenizer, start, end)
    return Example(
        example.dataset,
        example.id,
        example.label,
        example.outcome,
        example.score,
        example.kind,
        tuple(pieces),
        start,
        len(evidence) - end,
    )


def pieces_of(
    text: Text, evidence: np.ndarray, tokenizer: Any, start: int, end: int
) -> Iterator[Piece]:
    """Yield the tokens from `start` to `end - 1`, joined where one character takes several."""
    first = start
    for at in range(start, end):
        spelt = tokenizer.decode(list(text.tokens[first : at + 1]))
        whole = not spelt.endswith(UNFINISHED) or at - first > 2 or at == end - 1  # noqa: PLR2004 - 4 bytes
        if not whole:
            continue
        some = evidence[first : at + 1]
        best = float(some.max())
        yield Piece(spelt, best if np.isfinite(best) else None, first >= text.prompt_tokens)
        first = at + 1
