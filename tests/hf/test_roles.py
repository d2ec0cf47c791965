"""`scan`, `policy record` and `saeguard test` by role, against Transformers and turns by hand."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

from saeguard.guard.scopes import BY_ROLE, LOOKS, SCOPES
from saeguard.policy_tools.recording import Recording, read_recording
from tests import tiny
from tests.cli.project import run
from tests.guard.watchlists import coded
from tests.guarded import LAYER, feature_set
from tests.models import write_policy
from tests.templates import REFUSED

ABOVE = 0.2
CHATS = {
    "asked": ([("user", "Tell me a secret.")], "No, I had rather not."),
    "again": (
        [
            ("system", "Be brief."),
            ("user", "user: hi"),
            ("assistant", "Hello."),
            ("tool", "[3]"),
            ("user", "Loud?"),
        ],
        "Quite.",
    ),
    "open": ([("system", "Listen."), ("user", "Now?")], ""),
}
"""Prompt and completion."""


@dataclass(frozen=True)
class Setup:
    """A tiny model, and a policy of each scope on the same feature."""

    folder: Path

    def run(self, *arguments: object) -> int:
        """Run the command with the feature sets."""
        return run(*map(str, arguments), "--feature-sets", str(self.folder / "sets"))

    def scan(self) -> int:
        """Scan the texts into `verdicts.jsonl`."""
        return self.run(
            "scan", self.folder / "texts.jsonl", "--model", self.folder / "model",
            "--policies", self.folder / "policies", "--out", self.folder / "verdicts.jsonl",
        )  # fmt: skip

    def record(self) -> Recording:
        """Record the texts, and read what was written."""
        assert self.run(
            "policy", "record", self.folder / "texts.jsonl", "--model", self.folder / "model",
            "--out", self.path,
        ) == 0  # fmt: skip
        return read_recording(self.path)

    @property
    def path(self) -> Path:
        """The recording."""
        return self.folder / "r.safetensors"

    def leave_only(self, scope: str) -> Path:
        """Remove the policies of other scopes; return the file that is left."""
        for file in (self.folder / "policies").iterdir():
            if file.stem != scope:
                file.unlink()
        return self.folder / "policies" / f"{scope}.yaml"


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    """Write everything."""
    tiny.save_model(tmp_path / "model")
    feature_set(tmp_path / "sets", tiny.D)
    for scope in SCOPES:
        write_policy(
            tmp_path / "policies" / f"{scope}.yaml", id=f"test.{scope}", scope=scope,
            feature_set="demo", detect={"a": {"feature": "loud", "above": ABOVE}}, condition="a",
        )  # fmt: skip
    lines = [
        {"id": id_, "prompt": [{"role": r, "content": c} for r, c in chat], "completion": said}
        for id_, (chat, said) in CHATS.items()
    ]
    texts = "".join(f"{json.dumps(line)}\n" for line in lines)
    (tmp_path / "texts.jsonl").write_text(texts)
    return Setup(tmp_path)


def by_hand(id_: str) -> tuple[list[int], list[str]]:
    """Return a text's tokens, and where each stands."""
    chat, said = CHATS[id_]
    ids, roles = tiny.chat_by_hand(chat)
    more = tiny.tokenizer()(said, add_special_tokens=False)["input_ids"]
    return [*ids, *more], [*roles, *["output"] * len(more)]


@cache
def loaded(folder: Path) -> Any:
    """Return the model."""
    return AutoModelForCausalLM.from_pretrained(folder / "model").eval()


def loud(folder: Path, tokens: list[int]) -> np.ndarray:
    """Return the feature's share at each token, from Transformers' residual and the SAE's files."""
    model = loaded(folder)
    with torch.no_grad():
        x = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[LAYER + 1][0]
    with safe_open(folder / "sets" / "sae" / "sae_weights.safetensors", "pt") as sae:
        W_enc, threshold = sae.get_tensor("W_enc"), sae.get_tensor("threshold")
    pre = x @ W_enc
    f = torch.where(pre > threshold, pre, 0)
    out: np.ndarray = (f[:, 1] + 0.5 * f[:, 2]).numpy()
    return out


def test_scan_by_role(setup: Setup) -> None:
    """Each scope's score is the highest in its role's turns, of as many tokens as these have."""
    assert setup.scan() == 0
    lines = [json.loads(line) for line in (setup.folder / "verdicts.jsonl").read_text().split("\n")
             if line]  # fmt: skip
    assert len(lines) == len(CHATS) * len(SCOPES)
    outcomes = set()
    for line in lines:
        tokens, places = by_hand(line["id"])
        scope: Any = line["policy"].removeprefix("test.")
        looks = np.isin(places, LOOKS[scope])
        usable = looks & ~np.isin(tokens, [0, 1, 2])
        share = loud(setup.folder, tokens)[usable]
        assert line["coverage"]["tokens"] == looks.sum(), line
        assert line["coverage"]["evaluated"] == usable.sum()
        if not usable.any():
            assert (line["verdict"], line["score"]) == ("not_evaluated", None)
        else:
            assert line["score"] == pytest.approx(share.max() / ABOVE, rel=1e-4)
            assert line["verdict"] == ("match" if share.max() > ABOVE else "no_match")
        outcomes.add((scope, line["verdict"]))
    assert {("user", "match"), ("user", "no_match"), ("tool", "match")} < outcomes
    assert ("tool", "not_evaluated") in outcomes


def test_recorded_roles_are_read_back(setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    """Every token's place is kept, and verdicts from the recording are those of `scan`."""
    recording = setup.record()
    assert recording.roles is not None
    assert recording.ids == tuple(CHATS)
    for i, id_ in enumerate(recording.ids):
        _, places = by_hand(id_)
        assert recording.roles[recording.span(i)].tolist() == coded(places).tolist()
    assert setup.scan() == 0
    capsys.readouterr()
    assert setup.run("policy", "explain", setup.folder / "policies", setup.path, "--json") == 0
    found = {(r["text"], r["policy"]): r for r in json.loads(capsys.readouterr().out)}
    scanned = (setup.folder / "verdicts.jsonl").read_text().splitlines()
    for line in map(json.loads, scanned):
        again = found.pop((line["id"], line["policy"]))
        assert again["verdict"] == line["verdict"]
        assert again["first_token"] == line["first_token"]
    assert not found


def make_old(path: Path) -> None:
    """Make a recording one from before there were roles."""
    with safe_open(path, "numpy") as file:
        kept = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys() if name != "roles"}  # noqa: SIM118
    assert "no_roles" not in kept
    save_file(tensors, path, metadata=kept)


OLD = "it was recorded without roles; record the texts again with `saeguard policy record`"


@pytest.mark.parametrize("scope", sorted(BY_ROLE))
def test_an_old_recording_is_refused(
    scope: str, setup: Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    """Policy, scope, recording, reason, what is allowed and what to do; never a verdict."""
    setup.record()
    make_old(setup.path)
    policy = setup.leave_only(scope)
    says = (
        f"{policy}: scope: {scope}, but {setup.path} does not hold the roles of a prompt's "
        f"tokens: {OLD}; allowed here: prompt, output, both"
    )
    capsys.readouterr()
    assert setup.run("policy", "explain", policy, setup.path) == 2
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", f"{says}\n")
    setup.path.rename(policy.with_name("r.safetensors"))
    policy.with_name(f"{scope}.test.yaml").write_text(
        f"schema: saeguard.test/v1\npolicy: test.{scope}\ncases:\n"
        "  - {name: a, recording: r.safetensors, recorded_text: again, expect: match}\n"
        "  - {name: b, recording: r.safetensors, recorded_text: again, expect: no_match}\n"
    )
    assert setup.run("test", policy) == 1
    out = capsys.readouterr().out
    assert out.count(OLD) == 2
    assert "0 passed, 2 failed" in out


def test_an_old_recording_serves_other_scopes(setup: Setup) -> None:
    """Where no policy asks, nothing is missing."""
    setup.record()
    make_old(setup.path)
    assert setup.run("policy", "explain", setup.leave_only("prompt"), setup.path) == 0


def test_a_template_that_cannot_be_told(setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    """`scan` refuses, and a recording keeps the reason for when a policy asks."""
    template = setup.folder / "model" / "chat_template.jinja"
    template.write_text(REFUSED["earlier answers are left out"].template)
    why = "it omits messages of user, assistant"

    assert setup.scan() == 2
    says = (
        "assistant.yaml: scope: assistant, but the model's chat template does not identify that "
        f"role exactly: {why}; allowed here: prompt, output, both\n"
    )
    assert says in capsys.readouterr().err
    assert not (setup.folder / "verdicts.jsonl").exists()

    recording = setup.record()
    assert (recording.roles, recording.no_roles) == (None, why)
    policy = setup.leave_only("user")
    capsys.readouterr()
    assert setup.run("policy", "explain", policy, setup.path) == 2
    assert capsys.readouterr().err == (
        f"{policy}: scope: user, but {setup.path} does not hold the roles of a prompt's "
        f"tokens: {why}; allowed here: prompt, output, both\n"
    )
