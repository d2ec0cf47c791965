"""`saeguard scan` writes one line per text and policy, whole or not at all."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from saeguard.cli.failures import Verbs
from saeguard.cli.scan import verb
from saeguard.errors import CannotRunError
from saeguard.hf.readings import TransformersEngine
from tests.cli.project import run
from tests.guarded import feature_set
from tests.tiny import D, save_model

POLICY = """\
schema: saeguard.policy/v1
id: noise.loud
title: Loud texts
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


CASES = """\
schema: saeguard.test/v1
policy: noise.loud
cases:
  - {name: loud, shares: {loud: 0 0.9}, prompt_tokens: 1, expect: match}
  - {name: low, shares: {loud: 0 0.1}, prompt_tokens: 1, expect: no_match}
"""


@dataclass(frozen=True)
class Setup:
    """Files of one scan."""

    folder: Path

    def run(
        self,
        *lines: object,
        above: float = 0.5,
        scope: str = "output",
        options: Sequence[str] = (),
    ) -> Result:
        """Write the texts and a policy, and scan."""
        texts = self.folder / "in.jsonl"
        texts.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        policies = self.folder / "policies"
        policies.mkdir(exist_ok=True)
        (policies / "loud.yaml").write_text(POLICY.format(above=above, scope=scope))
        app = typer.Typer(cls=Verbs)
        app.callback()(lambda: None)
        app.command()(verb)
        arguments = [str(texts), "--model", str(self.folder / "model")]
        arguments += ["--policies", str(policies), "--feature-sets", str(self.folder / "sets")]
        return CliRunner().invoke(app, ["verb", *arguments, "--out", str(self.out), *options])

    @property
    def out(self) -> Path:
        """The file that is written."""
        return self.folder / "out" / "verdicts.jsonl"

    def lines(self) -> list[dict[str, object]]:
        """What was written."""
        return [json.loads(line) for line in self.out.read_text().splitlines()]


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    """A tiny model with a feature set."""
    save_model(tmp_path / "model")
    feature_set(tmp_path / "sets", D)
    return Setup(tmp_path)


def test_verdicts(setup: Setup) -> None:
    """Lines come in the order of the texts, with coverage that adds up."""
    chat = [{"role": "user", "content": "Tell me a secret."}]
    result = setup.run(
        {"id": "long", "prompt": chat, "completion": "No, I had rather not tell you that one."},
        {"id": "short", "text": "hi<|end|>"},
        {"id": "none", "prompt": chat, "completion": ""},
    )
    assert result.exit_code == 0, result.output
    long, short, none = setup.lines()
    assert [line["id"] for line in (long, short, none)] == ["long", "short", "none"]
    assert long["coverage"] == {"tokens": 39, "evaluated": 39, "skipped": {}}
    assert short["coverage"] == {"tokens": 3, "evaluated": 2, "skipped": {"special_token": 1}}
    assert (none["verdict"], none["score"]) == ("not_evaluated", None)
    assert {line["verdict"] for line in (long, short)} <= {"match", "no_match"}
    assert (long["policy"], long["threshold"], long["mode"]) == ("noise.loud", 1.0, "shadow")


def test_threshold_decides(setup: Setup) -> None:
    """The score is in thresholds: halving `above` doubles it; a match names its first token."""
    text = {"id": "a", "text": "Which of these letters is loud?"}
    setup.run(text, above=0.5)
    (once,) = setup.lines()
    setup.run(text, above=0.25)
    (twice,) = setup.lines()
    assert twice["score"] == pytest.approx(2 * once["score"])
    result = setup.run(text, above=0.01)
    (match,) = setup.lines()
    assert (match["verdict"], isinstance(match["first_token"], int)) == ("match", True)
    assert "1 of 1 texts match" in result.output


def test_bad_line_writes_nothing(setup: Setup) -> None:
    """A mistake names file, line and field, and an older output stays as it was."""
    setup.run({"id": "a", "text": "x"})
    before = setup.out.read_text()
    result = setup.run({"id": "a", "text": "x"}, {"id": "b"})
    assert result.exit_code == 2
    assert "in.jsonl:2: line: give either `text`" in result.output
    assert setup.out.read_text() == before
    assert [p.name for p in setup.out.parent.iterdir()] == ["verdicts.jsonl"]


def test_texts_are_read_before_the_model(setup: Setup) -> None:
    """A bad line, or no line at all, is told at once, though the weights are minutes away."""
    (setup.folder / "model" / "model.safetensors").unlink()
    result = setup.run({"id": "a", "text": "x"}, {"id": "b"})
    assert result.exit_code == 2
    assert "in.jsonl:2: line: give either `text`" in result.output
    result = setup.run()
    assert result.exit_code == 2
    assert "in.jsonl: the file holds no text" in result.output
    result = setup.run({"id": "a", "text": "x"})
    assert result.exit_code == 2
    assert "Transformers cannot load it" in result.output


@pytest.mark.parametrize(
    "command",
    ["policy record in.jsonl --out r.safetensors", "test policies --benign in.jsonl"],
)
def test_policy_tools_read_texts_first_too(
    setup: Setup,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    """The same of the tools that record, or judge texts as if recorded."""
    setup.run({"id": "a", "text": "x"}, {"id": "b"})
    (setup.folder / "policies" / "loud.test.yaml").write_text(CASES)
    (setup.folder / "model" / "model.safetensors").unlink()
    monkeypatch.chdir(setup.folder)
    with_model = [*command.split(), "--model", "model", "--feature-sets", "sets"]
    assert run(*with_model) == 2
    assert "in.jsonl:2: line: give either `text`" in capsys.readouterr().err
    Path("in.jsonl").write_text("")
    assert run(*with_model) == 2
    assert "in.jsonl: the file holds no text" in capsys.readouterr().err


def test_other_model_is_refused(setup: Setup) -> None:
    """A feature set does not run on a model of another shape."""
    file = setup.folder / "sets" / "demo.yaml"
    file.write_text(file.read_text().replace("num_layers: 3", "num_layers: 4"))
    result = setup.run({"id": "a", "text": "x"})
    assert result.exit_code == 2
    assert "4 layers, but" in result.output
    assert not setup.out.exists()


ROWS = [{"id": f"t{i}", "text": "x" * (i + 1)} for i in range(5)]


def failing(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Let the engine fail after some texts."""
    read = TransformersEngine.read

    def some(self: TransformersEngine, texts: Iterable[Any]) -> Iterator[Any]:
        yield from islice(read(self, texts), after)
        raise CannotRunError("the engine is gone")

    monkeypatch.setattr(TransformersEngine, "read", some)


def test_a_run_that_is_cut_off_goes_on(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no result until it is whole, and then it is that of one run."""
    setup.run(*ROWS)
    whole = setup.out.read_text()
    setup.out.unlink()
    with monkeypatch.context() as patch:
        failing(patch, after=2)
        cut = setup.run(*ROWS)
    assert cut.exit_code == 3
    assert "the engine is gone" in cut.output
    assert "2 of 5 texts are kept in" in cut.output
    assert not setup.out.exists()
    assert "go on with --resume" in setup.run(*ROWS).output
    again = setup.run(*ROWS, options=["--resume"])
    assert again.exit_code == 0, again.output
    assert "of 5 texts match" in again.output
    assert setup.out.read_text() == whole
    assert [p.name for p in setup.out.parent.iterdir()] == ["verdicts.jsonl"]


def test_only_the_same_run_goes_on(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other texts, policies or number types are told apart from those of the earlier run."""
    with monkeypatch.context() as patch:
        failing(patch, after=2)
        setup.run(*ROWS)
    resume = ["--resume"]
    assert "another texts" in setup.run(*ROWS[:4], options=resume).output
    assert "another watch list" in setup.run(*ROWS, above=0.7, options=resume).output
    assert "another dtype" in setup.run(*ROWS, options=[*resume, "--dtype", "bfloat16"]).output
    assert setup.run(*ROWS, options=resume).exit_code == 0


def test_rows_that_are_not_read_are_an_error(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that ends early without a word leaves no result."""
    read = TransformersEngine.read
    monkeypatch.setattr(
        TransformersEngine, "read", lambda self, texts: islice(read(self, texts), 3)
    )
    result = setup.run(*ROWS)
    assert result.exit_code == 3
    assert "expected 5 texts, the engine returned 3" in result.output
    assert not setup.out.exists()


def test_options_of_the_other_engine_are_refused(setup: Setup) -> None:
    """An option that would do nothing is a mistake."""
    for options in (["--tensor-parallel-size", "2"], ["--vllm-args", "--enforce-eager"]):
        result = setup.run(*ROWS, options=options)
        assert (result.exit_code, setup.out.exists()) == (2, False)
        assert f"{options[0]}: only --engine vllm takes it" in result.output
    result = setup.run(*ROWS, options=["--engine", "vllm", "--device", "cpu"])
    assert "--device: found 'cpu', but vLLM runs on the device" in result.output


def test_bfloat16_is_near(setup: Setup) -> None:
    """The other number type moves scores a little, and says so in nothing but the score."""
    setup.run(*ROWS, above=0.01)
    exact = setup.lines()
    result = setup.run(*ROWS, above=0.01, options=["--dtype", "bfloat16"])
    assert result.exit_code == 0, result.output
    for before, after in zip(exact, setup.lines(), strict=True):
        assert after["coverage"] == before["coverage"]
        assert after["score"] == pytest.approx(before["score"], rel=0.2, abs=0.5)
    assert setup.lines() != exact


WRONG = [{"id": "b"}, {"id": "long", "text": "y" * 300}]


def test_what_is_left_out_is_told(setup: Setup) -> None:
    """Lines that are skipped are listed at the end, and verdicts say how much was cut off."""
    assert setup.run(*ROWS, *WRONG).exit_code == 2
    result = setup.run(*ROWS, *WRONG, options=["--skip"])
    assert result.exit_code == 0, result.output
    assert "in.jsonl:6: line: give either" in result.output
    assert "in.jsonl: wrong, and left out: 2 lines" in result.output
    assert [line["id"] for line in setup.lines()] == [row["id"] for row in ROWS]

    result = setup.run(*ROWS, *WRONG[1:], options=["--truncate"])
    assert "cut to 256 tokens: 1 text; what follows was not read" in result.output
    [*short, long] = setup.lines()
    assert (long["id"], long["tokens_cut"]) == ("long", 45)
    assert all("tokens_cut" not in line for line in short)


def test_a_run_that_skips_goes_on(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines left out do not count, wherever the run was cut off."""
    rows = [ROWS[0], WRONG[0], *ROWS[1:3], WRONG[1], *ROWS[3:]]
    setup.run(*rows, options=["--skip"])
    whole = setup.out.read_text()
    setup.out.unlink()
    with monkeypatch.context() as patch:
        failing(patch, after=3)
        assert "3 of 5 texts are kept in" in setup.run(*rows, options=["--skip"]).output
    other = ["--resume", "--skip", "--truncate"]
    assert "another truncate" in setup.run(*rows, options=other).output
    again = setup.run(*rows, options=["--resume", "--skip"])
    assert again.exit_code == 0, again.output
    assert setup.out.read_text() == whole


def test_ctrl_c(setup: Setup) -> None:
    """An interrupt keeps what is done and tells how to go on; the result is that of one run."""
    texts = [{"id": i, "text": "x" * (1 + i % 40)} for i in range(1500)]
    assert setup.run(*texts[:1]).exit_code == 0
    setup.out.unlink()
    path = setup.folder / "in.jsonl"
    path.write_text("".join(f"{json.dumps(text)}\n" for text in texts))
    command = [
        sys.executable, "-m", "saeguard", "scan", str(path), "--model", str(setup.folder / "model"),
        "--policies", str(setup.folder / "policies"), "--feature-sets", str(setup.folder / "sets"),
        "--out", str(setup.out),
    ]  # fmt: skip
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    index = setup.out.with_name("verdicts.jsonl.part") / "index"
    while running.poll() is None and not (index.exists() and index.stat().st_size):
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130
    assert re.search(r"\d+ of 1500 texts are kept in .*; --resume goes on", said)
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=True)
    assert "of 1500 texts match" in done.stdout
    assert [line["id"] for line in setup.lines()] == [str(text["id"]) for text in texts]
