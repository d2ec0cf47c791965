"""`--engine vllm` reads texts as Transformers does, on both runners, or ends with an error.

The same command runs with both engines on the same file: texts, chats and completions, under
policies on prompt, output and roles. Texts share prefixes, so some tokens come from vLLM's prefix
cache, and prompts are computed in chunks.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from saeguard.policy_tools.recording import read_recording
from saeguard.vllm.api_server.signals import forward_signals
from saeguard.vllm.settings import ConfigError, parse_settings
from tests import models
from tests.engine import engines

pytestmark = pytest.mark.engine

MARGIN = 0.001
"""docs/correctness.md: a score this near the threshold may fall on either side of it."""
VLLM = ["--engine", "vllm"]
SMALL = "--enforce-eager --max-model-len 300 --max-num-batched-tokens 128 --max-num-seqs 4"
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]


class Project:
    """Files of one scan."""

    def __init__(self, root: Path) -> None:
        """Make a model, an SAE, policies and texts."""
        self.root = root
        self.guarded = models.make_guarded(root)
        for i, scope in enumerate(("user", "system", "assistant")):
            models.write_policy(
                root / "policies" / f"{scope}.yaml", id=f"test.{scope}", scope=scope,
                detect={"a": {"feature": f"f{4 * i}", "above": 0.3}}, condition="a",
                **{"for": "2 of 4 tokens"},
            )  # fmt: skip

    def texts(self, count: int) -> Path:
        """Write `count` texts of three forms."""
        rng = np.random.default_rng(count)

        def words(most: int) -> str:
            return " ".join(rng.choice(WORDS, rng.integers(1, most + 1)))

        rows: list[dict[str, Any]] = []
        system = {"role": "system", "content": "You answer all that you are asked."}
        for i in range(count):
            chat = [system, {"role": "user", "content": words(9)}]
            row = [
                {"text": words(30)},
                {"prompt": chat, "completion": words(9)},
                {"prompt": "the quick brown fox " + words(9), "completion": words(9)},
            ][i % 3]
            rows.append({"id": f"t{i}", **row})
        file = self.root / f"{count}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file

    def run(
        self, *arguments: str, v2: bool = False, prelude: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run the command in a process of its own; each of its processes runs `prelude` first."""
        env = engines.environment(v2=v2)
        if not v2:  # as users have it: the engine core in a process of its own
            env.pop("VLLM_ENABLE_V1_MULTIPROCESSING")
        if prelude:
            hooks = self.root / "prelude"
            hooks.mkdir(exist_ok=True)
            (hooks / "sitecustomize.py").write_text(prelude)
            env["PYTHONPATH"] = f"{hooks}:{env['PYTHONPATH']}"
        return subprocess.run(
            [sys.executable, "-m", "saeguard", *arguments],
            cwd=self.root, env=env, capture_output=True, text=True, check=False, timeout=600,
        )  # fmt: skip

    def scan(
        self, texts: Path, out: str, *arguments: str, **how: Any
    ) -> subprocess.CompletedProcess[str]:
        """Scan texts."""
        sets = ["--policies", "policies", "--feature-sets", "feature_sets", "--model", "model"]
        return self.run("scan", str(texts), *sets, "--out", out, *arguments, **how)

    def by_hf(self, texts: Path) -> list[dict[str, Any]]:
        """Return what Transformers finds in texts; each file is scanned once."""
        out = f"{texts.stem}.by_hf.jsonl"
        if not (self.root / out).exists():
            ok(self.scan(texts, out))
        return self.lines(out)

    def lines(self, out: str) -> list[dict[str, Any]]:
        """Return what was written."""
        return [json.loads(line) for line in (self.root / out).read_text().splitlines()]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """One model for all tests."""
    return Project(tmp_path_factory.mktemp("offline"))


def ok(done: subprocess.CompletedProcess[str]) -> None:
    """Check that a command succeeded."""
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


def compare(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> int:
    """Compare verdicts within the stated margin, and coverage exactly; return the matches."""
    assert [(a["id"], a["policy"]) for a in ours] == [(b["id"], b["policy"]) for b in theirs]
    matches = 0
    for a, b in zip(ours, theirs, strict=True):
        assert a["coverage"] == b["coverage"], a["id"]
        assert (a["score"] is None) == (b["score"] is None)
        if a["score"] is None:
            assert a["verdict"] == b["verdict"], a["id"]
            continue
        assert a["score"] == pytest.approx(b["score"], abs=MARGIN), a["id"]
        if abs(b["score"] - 1) > MARGIN:
            assert (a["verdict"], a["acted"]) == (b["verdict"], b["acted"]), a["id"]
        matches += a["verdict"] == "match"
    return matches


@pytest.mark.parametrize(("v2", "count"), [(False, 60), (True, 9)], ids=["runner_v1", "runner_v2"])
def test_verdicts_equal(project: Project, count: int, *, v2: bool) -> None:
    """Every verdict, its score and its coverage; all tokens are read, the last one too."""
    texts = project.texts(count)
    done = project.scan(texts, "by_vllm.jsonl", *VLLM, "--vllm-args", SMALL, v2=v2)
    ok(done)
    by_vllm = project.lines("by_vllm.jsonl")
    assert compare(by_vllm, project.by_hf(texts)) > count
    assert len(by_vllm) == count * 9
    assert {reason for line in by_vllm for reason in line["coverage"]["skipped"]} == {
        "special_token"
    }
    assert not (project.root / "by_vllm.jsonl.part").exists()


def test_recordings_equal(project: Project) -> None:
    """The value of every feature at every token, roles and ids."""
    texts = str(project.texts(30))
    sets = ["--feature-sets", "feature_sets", "--model", "model", "--with-text"]
    ok(project.run("policy", "record", texts, *sets, "--out", "hf.safetensors"))
    vllm = [*VLLM, "--vllm-args", SMALL]
    ok(project.run("policy", "record", texts, *sets, "--out", "vllm.safetensors", *vllm))
    ours, theirs = (read_recording(project.root / f"{name}.safetensors") for name in ("vllm", "hf"))
    assert (ours.ids, ours.model, ours.definitions) == (theirs.ids, "model", theirs.definitions)
    assert ours.pieces == theirs.pieces
    for name in ("lengths", "prompt_tokens", "evaluable", "roles"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    np.testing.assert_allclose(ours.values, theirs.values, atol=1e-4)
    assert (theirs.values > 0).mean() > 0.05


DIES = """
import os
from saeguard.guard.readings import Readings
pop, done = Readings.pop, []
def dying(self, *args):
    done.append(1)
    if len(done) > 20:
        os._exit(9)
    return pop(self, *args)
Readings.pop = dying
"""
LOSES = """
from saeguard.guard.readings import Reading, Readings
pop, done = Readings.pop, []
def losing(self, *args):
    read = pop(self, *args)
    done.append(1)
    return read if len(done) != 20 else Reading(read.values[:-1], read.state[:-1])
Readings.pop = losing
"""


def cut(project: Project, texts: Path, prelude: str, said: str) -> None:
    """Scan with something that fails: exit code 3, no result, and what was read is kept."""
    arguments = [*VLLM, "--vllm-args", SMALL]
    done = project.scan(texts, "cut.jsonl", *arguments, prelude=prelude)
    assert done.returncode == 3, (done.stdout + done.stderr)[-6000:]
    assert said in done.stderr
    assert "of 60 texts are kept in cut.jsonl.part; --resume goes on" in done.stderr
    assert not (project.root / "cut.jsonl").exists()


def test_a_token_that_is_not_read_ends_the_command(project: Project) -> None:
    """No row is missing in silence."""
    cut(project, project.texts(60), LOSES, "expected all of them")
    shutil.rmtree(project.root / "cut.jsonl.part")


def test_an_engine_that_dies_ends_the_command_and_a_later_run_goes_on(project: Project) -> None:
    """With `--resume` the result is that of a run without an interruption."""
    texts = project.texts(60)
    cut(project, texts, DIES, "vLLM failed to read texts")
    ok(project.scan(texts, "cut.jsonl", "--resume", *VLLM, "--vllm-args", SMALL))
    compare(project.lines("cut.jsonl"), project.by_hf(texts))


def test_an_engine_without_the_guard_is_noticed(project: Project) -> None:
    """VLLM_PLUGINS without saeguard: an error, and no file."""
    prelude = "import os\nos.environ['VLLM_PLUGINS'] = 'other'\n"
    arguments = [*VLLM, "--vllm-args", SMALL]
    done = project.scan(project.texts(9), "unguarded.jsonl", *arguments, prelude=prelude)
    assert done.returncode == 3, (done.stdout + done.stderr)[-6000:]
    assert not (project.root / "unguarded.jsonl").exists()


def test_a_server_refuses_to_hand_out_values() -> None:
    """`read` in a server's settings ends it before an engine is built."""
    config = SimpleNamespace(additional_config={"saeguard": {"read": ["tiny/f0"]}})

    def original() -> None:
        pytest.fail("the server was built")

    with pytest.raises(ConfigError, match="expected policies, found features to read"):
        forward_signals(original, None, config)


@pytest.mark.parametrize(
    ("settings", "found"),
    [({}, "neither"), ({"policies": "p", "read": ["tiny/f0"]}, "both")],
)
def test_settings_are_a_server_s_or_an_offline_command_s(
    settings: dict[str, Any], found: str
) -> None:
    """Policies and features to read exclude each other."""
    with pytest.raises(ConfigError, match=f"expected policies or read, found {found}"):
        parse_settings(settings)
