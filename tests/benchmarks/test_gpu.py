"""`benchmarks/gpu.py` without a GPU: its checks can fail, and what it measured survives its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_engine, gpu_process, gpu_record, gpu_timing
from benchmarks.gpu_record import CUT, FAILED, HELD, NOT_RUN, Case, Record, append, read
from benchmarks.gpu_report import outcomes, status

ROOT = Path(__file__).parents[2]
CHILD = """
import os, sys, time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from benchmarks.gpu_record import append
name, out = sys.argv[1].split(";"), Path(sys.argv[2])
for piece in name:
    append(out, part="p", piece=piece, state="began")
    if piece == "dies":
        os._exit(9)
    while piece == "hangs":
        time.sleep(1)
    append(out, part="p", piece=piece, case="one", held=True)
    append(out, part="p", piece=piece, state="held", seconds=0)
"""


def command(out: Path, *arguments: str) -> list[str]:
    """Return the command of a run."""
    return [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--out", str(out), *arguments]


def run_children(out: Path, *groups: Sequence[str], seconds: float = 60) -> dict[str, str]:
    """Run groups of pieces in children; return the state of each piece."""
    gpu_process.run_groups(
        "p",
        groups,
        lambda names, _until: ["-c", CHILD, ";".join(names), str(out)],
        out=out,
        until=time.monotonic() + seconds,
        together=2,
        env={"PYTHONPATH": str(ROOT)},
    )
    return gpu_record.states(read(out), "p")


def test_kernels_hold_in_the_interpreter(tmp_path: Path) -> None:
    """Part A runs from end to end, and says that nothing was captured."""
    pytest.importorskip("triton")
    out = tmp_path / "gpu.jsonl"
    done = subprocess.run(
        command(out, "--parts", "a", "--seconds", "400"),
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    records = read(out)
    assert len(outcomes(records)) == 11
    assert set(outcomes(records).values()) == {HELD}
    assert all(r.get("held", True) for r in records)
    assert sum("case" in r for r in records) > 30
    if not torch.cuda.is_available():
        assert records[0]["replays"].startswith("plain calls")
        assert {r["captured"] for r in records if "of_ceiling" in r} == {False}


def test_a_run_that_is_ended_has_written_what_it_measured(tmp_path: Path) -> None:
    """It prints its tables, says that it did not finish, and leaves no process."""
    pytest.importorskip("triton")
    out = tmp_path / "gpu.jsonl"
    run = subprocess.Popen(
        command(out, "--parts", "a"), cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    while not (out.exists() and any("case" in r for r in read(out))):
        assert run.poll() is None
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    printed, _ = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM
    assert "read, checks" in printed
    found = outcomes(read(out))
    assert FAILED in found.values()
    assert NOT_RUN in found.values()
    assert not [pid for pid in processes() if str(out) in pid]


def processes() -> Iterator[str]:
    """Yield the command line of each process."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            yield (folder / "cmdline").read_text()
        except OSError:
            continue


def test_a_child_that_dies_costs_one_piece(tmp_path: Path) -> None:
    """Another child runs what was left of its group."""
    out = tmp_path / "r.jsonl"
    found = run_children(out, ["a", "dies", "b"], ["c"])
    assert found == {"a": HELD, "dies": FAILED, "b": HELD, "c": HELD}
    assert status(read(out)) == 1
    assert "status 9" in next(r["error"] for r in read(out) if "error" in r)


def test_a_child_that_hangs_is_ended(tmp_path: Path) -> None:
    """What it had begun is cut off, what was left is not run, and nothing has failed."""
    out = tmp_path / "r.jsonl"
    append(out, part="p", pieces=["a", "hangs", "b"])
    found = run_children(out, ["a", "hangs", "b"], seconds=6)
    assert found == {"a": HELD, "hangs": CUT, "b": NOT_RUN}
    assert status(read(out)) == 3


def test_cases_fail_alone(tmp_path: Path) -> None:
    """A case that raises, one that does not hold, and a piece that cannot go on: all written."""

    def fails() -> Record:
        raise ValueError("wrong")

    def some() -> Iterator[Case]:
        yield Case("raises", fails)
        yield Case("does not hold", lambda: {"held": False, "error": 3.0})
        yield Case("holds", lambda: {"held": True})

    def breaks() -> Iterator[Case]:
        yield Case("holds", lambda: {"held": True})
        raise OSError("no room")

    out = tmp_path / "r.jsonl"
    gpu_record.run_pieces("p", {"some": some, "breaks": breaks}, out, time.monotonic() + 60)
    records = read(out)
    assert gpu_record.states(records, "p") == {"some": FAILED, "breaks": FAILED}
    held = [r["held"] for r in records if "case" in r]
    assert held == [False, False, True, True, False]
    assert "ValueError: wrong" in next(r["error"] for r in records if r.get("case") == "raises")
    with out.open("a") as file:
        file.write('{"part": "p", "pie')  # broken off
    assert len(read(out)) == len(records)


def test_time_runs_out_between_cases(tmp_path: Path) -> None:
    """What was not reached is neither held nor failed."""

    def slow() -> Record:
        time.sleep(0.2)
        return {"held": True}

    def cases() -> Iterator[Case]:
        yield Case("first", slow)
        yield Case("second", slow)

    out = tmp_path / "r.jsonl"
    gpu_record.run_pieces("p", {"a": cases, "b": cases}, out, time.monotonic() + 0.1)
    assert gpu_record.states(read(out), "p") == {"a": CUT}


def test_wrong_activations_do_not_pass() -> None:
    """Neither do those that are off by more than rounding, missing, too many, or not numbers."""
    pytest.importorskip("triton")
    from benchmarks import gpu_tap

    torch.manual_seed(0)
    made = gpu_tap.make_read(6, 48, 9, torch.bfloat16, second=True, normed=False)
    gpu_tap.fill(made, exact=False)
    z = gpu_tap.stream(made) @ made.W.t() + made.b
    right = z * (z > made.theta)
    on = (right != 0).nonzero()[0].tolist()
    off = (right == 0).nonzero()[0].tolist()
    made.f[:6] = torch.cat([right, gpu_tap.stream(made).norm(dim=1, keepdim=True)], 1)
    assert gpu_tap.worst(made) <= 1
    for at, value in ((on, 0.0), (on, right[tuple(on)].item() + 0.01), (on, torch.nan), (off, 1.0)):
        wrong = right.clone()
        wrong[tuple(at)] = value
        f = made.f.clone()
        f[:6, :-1] = wrong
        assert gpu_tap.worst(replace(made, f=f)) == float("inf"), (at, value)


class FakeEvent:
    """A CUDA event by the host's clock."""

    def __init__(self, *, enable_timing: bool) -> None:
        """Record nothing yet."""
        assert enable_timing
        self.at: float | None = None

    def record(self) -> None:
        """Take the time."""
        self.at = time.perf_counter()

    def elapsed_time(self, end: FakeEvent) -> float:
        """Return milliseconds."""
        assert self.at is not None
        assert end.at is not None
        return 1e3 * (end.at - self.at)


class FakeGraph:
    """A CUDA graph that counts."""

    replays = 0

    def replay(self) -> None:
        """Count."""
        FakeGraph.replays += 1


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let CUDA's calls answer on a CPU: what only a GPU runs is run at least by its names."""
    stream = SimpleNamespace(wait_stream=lambda _other: None)
    fakes = {
        "Event": FakeEvent,
        "CUDAGraph": FakeGraph,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda _stream: nullcontext(),
        "graph": lambda _graph: nullcontext(),
        "synchronize": lambda: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    FakeGraph.replays = 0


@pytest.mark.usefixtures("fake_gpu")
def test_a_call_is_warmed_captured_and_timed_by_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the capture the call runs only to time its launch."""
    calls: list[int] = []
    monkeypatch.setattr(gpu_timing, "on_gpu", lambda: True)
    monkeypatch.setattr(gpu_timing, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(gpu_timing, "FLUSH_BYTES", 16)
    gpu_timing._flushing.cache_clear()
    replay = gpu_timing.captured(lambda: calls.append(1))
    assert len(calls) == gpu_timing.WARM_UPS + 1
    found = gpu_timing.times(lambda: calls.append(1), replay)
    gpu_timing._flushing.cache_clear()
    assert len(calls) == gpu_timing.WARM_UPS + 1 + gpu_timing.LAUNCHES
    assert found["samples"] == gpu_timing.SAMPLES
    assert FakeGraph.replays == 2 + 2 * gpu_timing.SAMPLES
    assert found.keys() == {"cold_us", "warm_us", "launch_us", "samples"}


@pytest.mark.usefixtures("fake_gpu")
def test_a_steps_graphs_are_summed_and_edges_left_out() -> None:
    """Two replays a step count together; what is launched between blocks does not count."""
    runner = SimpleNamespace(
        execute_model=lambda: torch.cuda.CUDAGraph().replay() or torch.cuda.CUDAGraph().replay(),
        sample_tokens=lambda: "tokens",
    )
    marks = gpu_engine.Marks(runner)
    for step in (-1, 0, 1, 2, 3):
        marks.step = step
        runner.execute_model()
        assert runner.sample_tokens() == "tokens"
    assert [step for step, what, *_ in marks.pairs if what == "graph"] == [0, 0, 1, 1, 2, 2, 3, 3]
    told = marks.take(1, 3, 4)
    assert told["graph_us"] > 0
    assert told["device_us"] >= told["graph_us"]
    assert told["replays_a_step"] == 2
    assert not marks.pairs


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.timeout(3600)
def test_engines_hold_on_a_cpu(tmp_path: Path) -> None:
    """Part B runs from end to end: texts, a clamp against Transformers, steps of every state."""
    out = tmp_path / "gpu.jsonl"
    done = subprocess.run(
        command(out, "--parts", "b", "--eager", "--seconds", "3000", "--start", "1000"),
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=3300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    records = read(out)
    assert set(outcomes(records).values()) == {HELD}
    same = [(r["same"], r["texts"]) for r in records if "same" in r]
    assert len(same) == 5
    assert {r["guard"] for r in records if "step_us" in r} == {
        "plain", "idle", "armed", "firing", "clamping"
    }  # fmt: skip
