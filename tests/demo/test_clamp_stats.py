"""Intervals and controls of the clamp evaluation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from demo import controls
from demo.evaluate_clamp import aims, document
from demo.stats import change, wilson


@pytest.mark.parametrize(
    ("hits", "trials", "expected"),
    [(0, 10, (0.0, 0.2775)), (5, 10, (0.2366, 0.7634)), (10, 10, (0.7225, 1.0))],
)
def test_wilson_gives_the_known_intervals(
    hits: int, trials: int, expected: tuple[float, float]
) -> None:
    """From the formula in Wilson 1927, as tabulated."""
    assert wilson(hits, trials) == pytest.approx(expected, abs=1e-4)


def test_a_change_is_of_the_sums_and_within_its_interval() -> None:
    """80 of 100 before, 20 of 100 after."""
    off, on = [1.0] * 80 + [0.0] * 20, [1.0] * 20 + [0.0] * 80
    value, (low, high) = change(off, on, [str(i // 4) for i in range(100)], seed=1)
    assert value == pytest.approx(-0.75)
    assert low < value < high < -0.5


def test_completions_of_one_prompt_are_resampled_together() -> None:
    """Fewer prompts make a wider interval, with the same completions."""
    rng = np.random.default_rng(0)
    off = np.ones(120)
    on = np.repeat(rng.integers(0, 2, 12), 10).astype(float)
    wide = change(off, on, [str(i // 10) for i in range(120)], seed=1)[1]
    narrow = change(off, on, [str(i) for i in range(120)], seed=1)[1]
    assert wide[1] - wide[0] > 2 * (narrow[1] - narrow[0])


def test_nothing_to_compare_with_is_an_error() -> None:
    """Rather than a change of minus nothing."""
    with pytest.raises(ValueError, match="sums to zero"):
        change([0.0, 0.0], [1.0, 0.0], ["a", "b"], seed=1)


def test_a_control_has_the_size_and_strength_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random latents, none of the policy's, scaled to the norm of the policy's edit."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(64, 16, generator=generator)
    W_dec = torch.nn.functional.normalize(torch.randn(64, 16, generator=generator), dim=1)
    x = torch.randn(50, 16, generator=generator)
    monkeypatch.setattr(controls, "read_decoder_rows", lambda _info, rows: W_dec[rows])
    monkeypatch.setattr(controls, "read_rows", lambda _info, rows: rows)
    monkeypatch.setattr(controls, "activate", lambda rows, x: torch.relu(x @ W[rows].t()))
    usual = torch.ones(64)
    usual[:8] = 0
    targets = controls.draw_control(
        None, usual, frozenset({8, 9}), 5, 40.0, x, np.random.default_rng(3)  # type: ignore[arg-type]
    )  # fmt: skip
    assert len(targets) == 5
    assert min(targets) > 9
    rows = list(targets)
    delta = (torch.tensor(list(targets.values())) - torch.relu(x @ W[rows].t())) @ W_dec[rows]
    assert float(delta.norm(dim=1).mean()) == pytest.approx(40.0, rel=1e-3)


def test_aims_that_are_missed_are_said_to_be() -> None:
    """Each is compared with its own bound."""

    def row(value: float) -> dict[str, object]:
        return {"change": value, "change_interval": (value - 0.01, value + 0.01)}

    results = {
        "completions": {
            "on": row(-0.5),
            "control 1": row(-0.05),
            "control 2": row(-0.3),
            "controls together": row(-0.1),
        },
        "benign_loss": {"on": row(0.01), "on, dialogues only": row(0.2)},
    }
    assert [aim["met"] for aim in aims(results)] == [False, True, False, True, False]


def test_the_page_says_what_was_measured() -> None:
    """Every number of the page comes from the results."""
    change = {"change": -0.9, "change_interval": (-0.95, -0.8), "edit_norm": 3.0}
    arm = {
        "completions": 207, "with_finding": 9, "share": 0.0435, "interval": (0.02, 0.08),
        "valid_python": 201, "valid_without_finding": 193, "policy_matched": 200,
    }  # fmt: skip
    loss = {"loss": 2.0, "tokens": 21010, "texts": 480, "texts_edited": 7}
    where = {
        "policy": "p", "latents": {"p": [1, 2]}, "layer": 3, "clamp_to": -0.5,
        "residual_norm": 110.7, "calibrated_edit_norm": 3.0, "vllm": "0", "bandit": "1",
        "prompts": 69, "samples": 3, "temperature": 0.7, "max_tokens": 128, "seconds": 9,
        "model_sha256": "m" * 64, "sae_sha256": "s" * 64, "policy_digest": "d" * 64,
    }  # fmt: skip
    names = ["on", "control 1", "controls together"]
    results = {
        "conditions": where,
        "completions": {"off": arm, **dict.fromkeys(names, arm | change)},
        "benign_loss": {"off": loss, "on": loss | change, "on, dialogues only": loss | change},
    }
    page = document(results)
    assert "more with the policy | -90.0% (-95.0% to -80.0%) | met |" in page
    assert "| off | 207 | 9 (4.3%) | 2.0% to 8.0% |  | 201 | 193 |  |  |" in page
    assert "| on, dialogues only | 2.0000 | -90.00% (-95.00% to -80.00%) | 7 of 480 |" in page
