"""A reading judges a text as the policy that is written for it does."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import numpy as np
import pytest
import torch

from saeguard.features.corpus import Scope, peaks
from saeguard.features.fit_probe import fit_probe
from saeguard.features.reading import PEAK, READINGS, Reading, read_words
from saeguard.guard.judge import alone, judge_text
from saeguard.policy_tools.scaffold import Draft, draft
from tests.features.planted import corpus
from tests.policy.example import read

ABOVE = 0.25


@pytest.mark.parametrize("reading", [*READINGS, Reading(2, 3)], ids=lambda r: r.words)
@pytest.mark.parametrize("scope", ["prompt", "output", "both"])
def test_the_policy_reads_the_same(tmp_path: Path, reading: Reading, scope: Scope) -> None:
    """The score of a drafted policy is the text's value over the threshold, special tokens out."""
    wanted = Draft("a.b", "own", {"f": ABOVE}, scope, reading)
    policy, errors = read(tmp_path, draft(wanted, "", date(2027, 1, 1))[0])
    assert errors == []
    assert policy is not None
    texts = corpus("search", 12).scoped(scope)
    share = np.random.default_rng(0).standard_normal(len(texts.tokens)).astype(np.float32)
    got = peaks(texts, share, reading)
    for i, begin in enumerate(texts.starts):
        span = slice(begin, begin + texts.lengths[i])
        rules, traces = alone(policy, {"f": share[span]})
        prompt = int((~texts.output[span]).sum())
        verdict = judge_text(rules, traces, ~texts.special[span], prompt)[0]
        assert verdict.score == pytest.approx(got[i] / ABOVE, rel=1e-6)
        assert (verdict.outcome == "match") == (got[i] > ABOVE)


@pytest.mark.parametrize("reading", [*READINGS, Reading(3, 8)])
def test_words(reading: Reading) -> None:
    """Evidence spells a reading in words that give it back."""
    assert read_words(reading.words) == reading


def test_other_words() -> None:
    """Words that spell no reading are refused with what is expected."""
    with pytest.raises(ValueError, match='expected "3 of 8", "the last token" or'):
        read_words("3 of many")


@pytest.mark.parametrize(("where", "reading"), [("end", READINGS[2]), ("peak", PEAK)])
def test_the_search_finds_where_it_shows(where: str, reading: Reading) -> None:
    """A sign at the last token is read there, although texts have strong tokens elsewhere."""
    texts = corpus("search", 160, signal=0.0).scoped("output")
    rng = np.random.default_rng(1)
    ends = texts.starts + texts.lengths - 1
    sign = np.where(texts.label, 3.0, -3.0)
    if where == "end":
        elsewhere = np.where(rng.random(len(ends)) < 0.5, 9.0, -9.0)
        texts.x[ends - 2, 0] = torch.from_numpy(elsewhere).float()
        texts.x[ends, 0] = torch.from_numpy(sign).float()
    else:
        texts.x[ends - 2, 0] = torch.from_numpy(np.where(texts.label, 9.0, 0.0)).float()
    assert fit_probe(texts, seed=0, readings=READINGS).reading == reading
