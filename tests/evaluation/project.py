"""A tiny model, a feature set, two policies, labelled texts, and `saeguard evaluate` on them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cli.project import run
from tests.guarded import feature_set
from tests.tiny import D, save_model

POLICY = """\
schema: saeguard.policy/v1
id: noise.{name}
title: The text is {name}
owner: noise@example.com
severity: low
mode: shadow
action: flag
scope: {scope}
feature_set: demo
rationale: Fires on loud texts.
detect:
  loud: {{feature: loud, above: {above}}}
condition: loud
"""
LETTERS = {True: "abcdefgh", False: "stuvwxyz"}


@dataclass(frozen=True)
class Project:
    """A folder, and the command run in it."""

    folder: Path

    def evaluate(self, *arguments: str) -> int:
        """Run the command, and return its exit code."""
        return run(
            "evaluate", "--policies", "policies", "--model", "model", "--feature-sets", "sets",
            *arguments,
        )  # fmt: skip

    def report(self, *arguments: str) -> dict[str, Any]:
        """Run the command, and return its JSON."""
        assert self.evaluate(*arguments, "--json", "out.json") == 0
        found: dict[str, Any] = json.loads((self.folder / "out.json").read_text())
        return found

    def write(self, name: str, *lines: Mapping[str, Any]) -> None:
        """Write a file of texts."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def lines(
    count: int, seed: int = 0, *, label: bool | None = None, behaviour: str = "noise"
) -> Iterator[dict[str, Any]]:
    """Yield pairs of a positive and a negative text of one template, of different letters."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        side = i % 2 == 0 if label is None else label
        text = "".join(rng.choice(list(LETTERS[side] + " "), rng.integers(8, 30)))
        yield {
            "id": f"{behaviour}/{i}",
            "behaviour": behaviour,
            "label": int(side),
            "prompt": "Say it.",
            "completion": text,
            "kind": f"kind {i // 2 % 2}",
            "template": f"t{i // 2}",
        }


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """Two policies on one feature, a set with both labels, one of positives only, ordinary ones."""
    save_model(tmp_path / "model")
    feature_set(tmp_path / "sets", D)
    (tmp_path / "policies").mkdir()
    for name, above, scope in (("loud", 0.5, "output"), ("shrill", 0.9, "both")):
        content = POLICY.format(name=name, above=above, scope=scope)
        (tmp_path / f"policies/{name}.yaml").write_text(content)
    found = Project(tmp_path)
    found.write("data/letters.jsonl", *lines(60))
    found.write("data/only.jsonl", *lines(8, 1, label=True))
    ordinary = [{**line, "label": 0} for line in lines(150, 2, behaviour="benign")]
    found.write("benign/plain.jsonl", *ordinary)
    monkeypatch.chdir(tmp_path)
    return found
