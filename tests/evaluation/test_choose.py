"""Which policies are judged on which datasets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from saeguard.evaluation.choose import choose_pairs, parse_pair, part_of, plain
from saeguard.evaluation.datasets import EvaluationError, read_datasets
from tests.evaluation.project import lines
from tests.evaluation.test_datasets import write
from tests.guarded import feature_set, policy
from tests.tiny import D, tokenizer


def test_pairs(tmp_path: Path) -> None:
    """By behaviour, by name, or all; a named policy leaves its behaviour's datasets."""
    sets = {"demo": feature_set(tmp_path / "sets", D)}
    files = [
        write(tmp_path / f"{name}.jsonl", *lines(4, behaviour=behaviour))
        for name, behaviour in (("x", "Noise"), ("y", "silence"), ("z", "noise"))
    ]
    datasets = read_datasets(files, tokenizer())
    policies = [policy("flag"), replace(policy("flag"), id="noise.other")]
    assert choose_pairs(policies, sets, datasets) == [(0, 0), (1, 0), (0, 2), (1, 2)]
    named = [("noise.o*", "y")]
    assert choose_pairs(policies, sets, datasets, named) == [(0, 0), (1, 1), (0, 2)]
    assert len(choose_pairs(policies, sets, datasets, every=True)) == 6
    with pytest.raises(EvaluationError, match=r"no dataset has the behaviour of a policy: .*noise"):
        choose_pairs(policies, sets, datasets[1:2])
    with pytest.raises(EvaluationError, match=r"no policy is named 'p'; there are: noise\.loud"):
        choose_pairs(policies, sets, datasets, [("p", "x")])
    with pytest.raises(EvaluationError, match="no dataset is named 'w'; there are: x, y, z"):
        choose_pairs(policies, sets, datasets, [("*", "w")])


def test_words_of_the_command() -> None:
    """A pair needs both sides; behaviours are compared in one spelling."""
    assert parse_pair("a.*=b") == ("a.*", "b")
    with pytest.raises(EvaluationError, match="--pair: found 'a', expected POLICY=DATASET"):
        parse_pair("a")
    assert plain("Unsafe-Code ") == plain("unsafe_code")
    assert [part_of(s) for s in ("output", "assistant", "user", "both")] == [
        "output", "output", "prompt", "both",
    ]  # fmt: skip
