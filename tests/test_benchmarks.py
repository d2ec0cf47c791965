"""Every benchmark runs to its end at its smallest size and writes the figures it promises."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.engine import engines


def run(name: str, *arguments: str) -> str:
    """Run a benchmark in a process of its own; return what it prints."""
    return output([sys.executable, "-m", f"benchmarks.{name}", *arguments])


def output(command: Sequence[str]) -> str:
    """Run a command at the repository's root; return what it prints."""
    done = subprocess.run(
        command,
        cwd=engines.ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(engines.ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def made(target: str, out: Path, *arguments: str) -> Any:
    """Run a benchmark that has a target of make and writes JSON; return it."""
    settings = [f"VENV={sys.prefix}", "MINUTES=0.1", f"ARGS={' '.join(arguments)} --out {out}"]
    output(["make", "-o", "setup", target, *settings])
    return json.loads(out.read_text())


def measured(name: str, out: Path, *arguments: str) -> Any:
    """Run a benchmark that writes JSON; return it."""
    run(name, *arguments, "--out", str(out))
    return json.loads(out.read_text())


def positive(figures: Mapping[str, Any], *names: str) -> None:
    """Assert that figures are there and above zero."""
    assert {name: figures[name] for name in names if not figures[name] > 0} == {}


@pytest.mark.engine
def test_overhead(tmp_path: Path) -> None:
    """Each state of the guard has step times; the firing one matches, the idle one does nothing."""
    result = made("bench", tmp_path / "overhead.json", "--tiny")
    states = result["batches"]["2"]
    assert set(states) == {"idle", "idle again", "armed", "firing", "clamping"}
    for state, figures in states.items():
        positive(figures, "step_ms", "tokens_per_s", "host_us")
        assert len(figures["step_ratio"]) == len(figures["throughput_ratio"]) == 3
        guarded = {"worker.before", "op", "worker.after", "collect", "engine.rules"}
        assert set(figures["parts_us"]) == ({"op"} if state.startswith("idle") else guarded)
    assert states["armed"]["verdicts"]["no_match"] > 0
    assert "match" not in states["armed"]["verdicts"]
    assert states["firing"]["verdicts"]["match"] > 0
    assert states["clamping"]["verdicts"]["match"] >= states["firing"]["verdicts"]["match"]
    (beside,) = result["reference"]
    positive(beside, "full_us", "watched_us")


@pytest.mark.engine
def test_peers(tmp_path: Path) -> None:
    """Each engine that is installed serves the same batches, and reads them; a plot shows them."""
    plot = tmp_path / "peers.svg"
    result = made("bench-peers", tmp_path / "peers.json", "--tiny", "--plot", str(plot))
    kinds = result["batches"]["2"]
    assert {"plain", "hook", "saeguard"} == set(kinds) - {"vllm-lens"}
    assert set(result["not_measured"]) == set(result["engines"]) - set(kinds)
    for kind, figures in kinds.items():
        positive(figures, "step_ms", *(["read"] if kind != "plain" else []))
        assert len(figures["ratio"]) == 3
    assert plot.stat().st_size


@pytest.mark.server
def test_serve(tmp_path: Path) -> None:
    """vLLM's client asks two servers, and the guarded one is in the state that it stands for."""  # noqa: D403
    plot = tmp_path / "serve.svg"
    result = measured("serve", tmp_path / "serve.json", "--tiny", "--plot", str(plot))
    assert set(result["servers"]) == {"unguarded", "firing"}
    for figures in result["servers"].values():
        positive(figures["median"], "output_throughput", "p50_ttft_ms", "p50_itl_ms", "p99_itl_ms")
    assert result["judged"]["firing"]["match"] > 0
    assert plot.stat().st_size


def test_encode(tmp_path: Path) -> None:
    """One size has ratios between our encoder, the libraries' and the bare product."""
    sizes = ("--widths", "16k", "--tokens", "1", "--watched", "32", "--least", "1")
    page = tmp_path / "encoding.md"
    shutil.copy(engines.ROOT / "docs" / "encoding.md", page)
    (tmp_path / "img").mkdir()
    out = tmp_path / "encode.json"
    result = made("bench-encode", out, *sizes, "--seconds", "0.1", "--docs", str(tmp_path))
    (case,) = result["cases"]
    assert (case["width"], case["tokens"]) == (16_384, 1)
    positive(
        case["seconds"]["cpu"], "product", "saeguard", "saelens", "sparsify topk", "watched 32"
    )
    assert all(len(ratio) == 3 for ratio in case["ratios"]["wall"].values())
    assert "Not measured" in page.read_text()
    assert (tmp_path / "img" / "encode.svg").stat().st_size


def test_match(tmp_path: Path) -> None:
    """The rules are timed beside a decode step."""
    sizes = ("--policies", "10", "--latents", "100", "--batches", "2", "--rounds", "1")
    result = measured("match", tmp_path / "match.json", *sizes, "--steps", "1", "--tiny")
    (cell,) = result["cells"]
    positive(cell, "step_ms", "rules_us", "share", "finish_us")


def test_rules(tmp_path: Path) -> None:
    """A pass is timed with warm and with cold caches, of this revision and of another worktree."""
    here = str(Path(__file__).resolve().parent.parent)
    arguments = ("--quick", "--repeats", "2", "--against", here)
    result = measured("rules", tmp_path / "rules.json", *arguments)
    assert len(result["cells"]) == 4
    assert set(result["revisions"]) == {"this", "other"}
    for cell in result["cells"]:
        positive(cell["this"], "warm", "cold", "finish")
        positive(cell["other"], "warm", "cold", "finish")


def test_ending() -> None:
    """The end of a request is timed; its log grows with the policies by `event_lines: all` only."""
    printed = run("ending", "--policies", "4", "8")
    size = {
        (int(policies), lines): int(n)
        for policies, lines, n in re.findall(
            r"(\d+) policies.*lines (\w+):.*; (\d+) bytes", printed
        )
    }
    assert size[4, "matches"] == size[8, "matches"]
    assert size[8, "all"] > 1.8 * size[4, "all"] > 1.8 * size[4, "matches"] > 0


def test_check() -> None:
    """The command is timed on a folder of policies."""
    printed = run("check", "--files", "3", "--runs", "1")
    assert "wall" in printed
    assert "processor" in printed


@pytest.mark.engine
def test_reload(tmp_path: Path) -> None:
    """Both kinds of change come into use, and steps around them are set beside the others."""
    sizes = ("--policies", "20", "--swaps", "2", "--pause", "0.2")
    result = measured("reload", tmp_path / "reload.json", *sizes)
    assert {kind: found["count"] for kind, found in result["reloads"].items()} == {
        "threshold": 1, "rows": 1,
    }  # fmt: skip
    positive(result["step_ms_while_reloading"], "steps", "p50")
    positive(result["step_ms_otherwise"], "steps", "p50")
    positive(result["file_to_use_ms"], "p50")


@pytest.mark.engine
def test_scan(tmp_path: Path) -> None:
    """Both engines judge every text, and each round compares them."""
    result = measured("scan", tmp_path / "scan.json", "--tiny")
    assert set(result["engines"]) == {"transformers:float32", "vllm:float32"}
    for state, figures in result["engines"].items():
        positive(figures, "start_s", "texts_per_s", "tokens_per_s")
        assert len(result["times_faster_than_first"][state]) == 1
        assert result["differs_from_first"][state]["changed"] == 0


@pytest.mark.server
def test_soak(tmp_path: Path) -> None:
    """A few seconds of random load: every request has its events, and they add up."""
    result = made("soak", tmp_path / "soak.json", "--eager")
    positive(result, "requests", "events", "tokens_evaluated")
    assert result["events"] % result["requests"] == 0
    positive(result["memory"], "mib_at_the_end")


@pytest.mark.server
def test_reload_storm(tmp_path: Path) -> None:
    """A few seconds of changing policies under load: every request has its verdicts."""
    result = made("reload-storm", tmp_path / "storm.json", "--eager")
    positive(result, "requests", "changes", "state_read")
    assert result["without_a_verdict"] == result["state_not_of_a_good_list"] == 0


def test_browse(tmp_path: Path) -> None:
    """An index is made and every view of the page opened; about as many latents fire as asked."""
    arguments = ("--latents", "512", "--texts", "20", "--l0", "20")
    result = measured("browse", tmp_path / "browse.json", *arguments)
    positive(result, "index_s", "index_mib", "first_view_ms")
    assert result["tokens"] == 20 * 200
    assert 10 < result["latents_a_token"] < 40
    assert set(result["views_ms"]) == {"/", "/?q=a", "/latent/{}"}


def test_every_benchmark_is_run_here() -> None:
    """A benchmark that nothing runs breaks unnoticed; test_gpu.py has those of a GPU."""
    folder = engines.ROOT / "benchmarks"
    programs = {p.stem for p in folder.glob("*.py") if '__name__ == "__main__"' in p.read_text()}
    programs = {name for name in programs if name.split("_")[0] != "gpu"}
    run_here = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    run_here |= {
        p.stem.removeprefix("test_")
        for p in (Path(__file__).parent / "benchmarks").glob("test_*.py")
    }
    assert programs <= run_here
