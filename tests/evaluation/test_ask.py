"""The model's own answer is read at the last token of each prompt, alone or in a batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from saeguard.evaluation.ask import NO, ROOM, YES, Question, answer_ids, ask, prompt_ids, render
from saeguard.hf.model import load_model
from tests.tiny import save_model, tokenizer


def test_score_is_that_of_the_text_alone(tmp_path: Path) -> None:
    """Padding and neighbours do not matter; yes and no are summed over their spellings."""
    lm = load_model(save_model(tmp_path))
    questions = [Question(text, False, "x") for text in ("a", "Longer text.", "b")]
    yes, no = (answer_ids(lm.tokenizer, s) for s in (YES, NO))
    shared = set(yes) & set(no)
    expected = []
    for question in questions:
        ids, cut = prompt_ids(question, lm.tokenizer, 256 - ROOM)
        assert not cut
        with torch.no_grad():
            logits = lm.model(input_ids=torch.tensor([ids])).logits[0, -1]
        sides = [[i for i in side if i not in shared] for side in (yes, no)]
        expected.append(float(logits[sides[0]].logsumexp(0) - logits[sides[1]].logsumexp(0)))
    found = {i: score for i, score, _ in ask(lm, questions)}
    assert [found[i] for i in range(3)] == pytest.approx(expected, abs=1e-4)


def test_long_texts_lose_their_beginning() -> None:
    """The question stays, and the cut is reported."""
    question = Question("start " + "x" * 900 + " end", True, "It is long")
    ids, cut = prompt_ids(question, tokenizer(), 250)
    asked = tokenizer().decode(ids)
    assert cut
    assert len(ids) <= 250
    assert "start" not in asked
    assert " end" in asked
    assert "It is long" in asked


def test_question_names_the_reply() -> None:
    """A reply is asked about as the last reply."""
    assert 'following true of the last reply? "T"' in render(Question("x", True, "T"), "x")
    assert 'following true of the text? "T"' in render(Question("x", False, "T"), "x")
