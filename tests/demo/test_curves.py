"""The curves are those of the evaluation's file, and nothing else is taken for one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from demo.curves import CurvesError, read_curves
from demo.report import render
from tests.demo import made

POINTS = [[0.0, 0.0], [0.1, 0.8], [1.0, 1.0]]


def row(name: str, sort: str, **fields: Any) -> dict[str, Any]:
    """One detector."""
    return {
        "name": name,
        "sort": sort,
        "reads": "output",
        "auroc": {"value": 0.9},
        "roc": POINTS,
        **fields,
    }


def evaluation(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """An evaluation of one dataset."""
    dataset = {"name": "set", "positives": 3, "negatives": 4, "rows": rows}
    return {"schema": "saeguard.evaluation/v1", "datasets": [dataset]}


def test_a_policy_is_drawn_beside_the_baselines_of_what_it_reads(tmp_path: Path) -> None:
    """A baseline on the prompt does not belong to a policy on the output."""
    file = tmp_path / "evaluation.json"
    rows = [
        row(f"deception.{made.EVIL}", "policy"), row("words, output", "words"),
        row("words, prompt", "words", reads="prompt"), row("length", "length", roc=[], auroc=None),
    ]  # fmt: skip
    file.write_text(json.dumps(evaluation(rows)))
    curves = read_curves(file, "evaluation.json")
    (chart,) = curves.charts
    assert [entry.name for entry in chart.legend] == [rows[0]["name"], "words, output"]
    assert chart.picture.count("<polyline") == 3  # with the diagonal
    page = render(made.account(), curves)
    assert "<figure>" in page
    assert "<script" not in page


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "expected JSON of `saeguard evaluate --json`"),
        ("[]", "expected JSON of `saeguard evaluate --json`"),
        ('{"schema": "other/v1"}', "found 'other/v1', expected 'saeguard.evaluation/v1'"),
        (json.dumps(evaluation([row("words", "words")])), "no dataset has a policy with a ROC"),
    ],
)
def test_another_file_is_refused(content: str, expected: str, tmp_path: Path) -> None:
    """With its name, what was found and what was expected."""
    file = tmp_path / "evaluation.json"
    file.write_text(content)
    with pytest.raises(CurvesError, match=expected):
        read_curves(file, "evaluation.json")
