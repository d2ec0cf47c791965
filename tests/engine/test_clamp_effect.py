"""`saeguard features clamp-effect` on a real engine: arms differ by what is edited alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saeguard.effect.attribute import Scored, log_probabilities, setting
from saeguard.effect.prompts import completion_of, read_prompts, tokens_of
from saeguard.hf.model import load_model
from saeguard.sae import inspect
from tests import models
from tests.engine import engines

pytestmark = pytest.mark.engine

CLAMP = {3: 1.0, 8: 0.5}
ACTIVATION = 6.0


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A comparison on a small random model with every measure."""
    root = tmp_path_factory.mktemp("effect")
    models.make_model("llama", root / "model")
    models.make_sae(root / "sae")
    pairs = [
        {"id": f"{i}{label}", "prompt": f"Is {i} big?", "completion": word, "label": label,
         "template": f"t{i}"}
        for i in range(4) for label, word in ((0, "No."), (1, "Yes!"))
    ]  # fmt: skip
    code = [{"id": str(i), "prompt": f"Write f{i}.", "tests": ["assert f(1) == 2"]} for i in "ab"]
    _lines(root / "pairs.jsonl", pairs)
    _lines(root / "code.jsonl", code)
    command = [
        sys.executable, "-m", "saeguard", "features", "clamp-effect", "--model", "model",
        "--sae", "sae", "--latents", "3:1,8:0.5", "--edit", f"activation={ACTIVATION}",
        "--edit", "ablate", "--draws", "2", "--instead", "Be safe.", "--dtype", "float32",
        "--max-tokens", "8", "--max-model-len", "128", "--out", "out.json", "--answers",
        "answers.jsonl", "--markdown", "out.md", "--pairs", "pairs.jsonl", "--benign",
        "pairs.jsonl", "--code", "code.jsonl", "--tests", "code.jsonl", "--topic", "code.jsonl",
        "--words", "bridge",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=root, env=engines.environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return root, json.loads((root / "out.json").read_text())


def test_every_arm_is_measured(measured: tuple[Path, dict[str, Any]]) -> None:
    """Off, asked, each edit, each draw, and the draws together."""
    root, report = measured
    edits = ("activation=6", "ablate")
    arms = ["off", "asked", *(f"on, {e}" for e in edits)]
    arms += [f"random {i}, like {e}" for e in edits for i in (1, 2)]
    assert [arm["name"] for arm in report["arms"]] == arms
    together = [f"random, all draws like {e}" for e in edits]
    assert list(report["measures"]) == [*arms, *together]
    assert len({tuple(rows) for rows in report["measures"].values()}) == 1
    answers = [json.loads(line) for line in (root / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == len(arms) * 6
    assert "| on, ablate |" in (root / "out.md").read_text()


def test_controls_are_as_strong_as_the_clamp(measured: tuple[Path, dict[str, Any]]) -> None:
    """Random latents' edit has the norm of the clamp's own, and other latents."""
    arms = {arm["name"]: arm for arm in measured[1]["arms"]}
    own = arms["on, activation=6"]
    assert own["edit_norm"] > 1
    for number in (1, 2):
        control = arms[f"random {number}, like activation=6"]
        assert control["edit_norm"] == pytest.approx(own["edit_norm"], rel=1e-3)
        assert not set(control["latents"]) & set(own["latents"])


def test_the_clamp_does_what_transformers_does(measured: tuple[Path, dict[str, Any]]) -> None:
    """The loss on given completions, with the clamp and without, is that of a plain hook."""
    root, report = measured
    lm, info = load_model(root / "model"), inspect(root / "sae")
    texts = [
        Scored((*before, *after), len(before), p.label, p.question, p.template)
        for p in read_prompts(root / "pairs.jsonl", completion=True)
        for before in [tokens_of(p, lm.tokenizer)]
        for after in [completion_of(p, lm.tokenizer)]
    ]
    lengths = np.array([len(t.tokens) - t.prompt_tokens for t in texts])
    plain = log_probabilities(lm, texts, info.layer)
    targets = {latent: weight * ACTIVATION for latent, weight in CLAMP.items()}
    edit = setting(info, targets, lm.model.device)
    clamped = log_probabilities(lm, texts, info.layer, edit, lm.special_tokens)
    name = "loss per token on ordinary text"
    for arm, expected in (("off", plain), ("on, activation=6", clamped)):
        loss = -float((expected * lengths).sum() / lengths.sum())
        assert report["measures"][arm][name]["value"] == pytest.approx(loss, rel=1e-3)
    assert report["measures"]["on, activation=6"][name]["change"] != 0


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
