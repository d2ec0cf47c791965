"""Reload 1,000 policies under load: how long it takes, and what the steps around it notice.

`python -m benchmarks.reload --swaps 20`. One engine in one process, as with one GPU: the thread
that swaps lists shares Python's lock with the steps. A batch decodes without end; every other
second one policy of the folder changes, by turns its threshold and the latents it watches. Steps in
which a reload was under way, from the change of the file to the first step behind the swap, are set
beside all others of the same process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from rich.console import Console

from saeguard.reload.compiler_process import read
from saeguard.reload.policy_source import ReadCache, Source
from tests import models
from tests.engine.engines import random_prompts

ROOT = Path(__file__).resolve().parent.parent
HIDDEN, LAYERS, LATENTS = 512, 6, 2048


def policy(folder: Path, i: int, above: float, latent: int) -> None:
    """Write one policy, whole or not at all."""
    part = folder / ".part"
    detect = {
        "a": {"feature": f"f{latent}", "above": above},
        "b": {"feature": f"f{i % 500}", "above": 50.0},
    }
    models.write_policy(part, id=f"bench.p{i}", detect=detect, condition="a and b")
    part.rename(folder / f"p{i}.yaml")


def build(root: Path, policies: int) -> dict[str, Any]:
    """Make a random Llama, an SAE and the policies; return arguments of `vllm.LLM`."""
    import transformers  # noqa: PLC0415 - seconds each

    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=HIDDEN, intermediate_size=1536, num_hidden_layers=LAYERS,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=4096,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(root / "model")
    sae = models.make_sae(root / "sae", layer=LAYERS // 2, d_in=HIDDEN, d_sae=LATENTS)
    latents = tuple(range(LATENTS))
    models.write_feature_set(root / "sets" / "tiny.yaml", sae, latents=latents, layers=LAYERS)
    folder = root / "policies"
    folder.mkdir()
    for i in range(policies):
        policy(folder, i, 60.0, i % 500)
    settings = {"policies": str(folder), "feature_sets": str(root / "sets"), "watch_capacity": 1024}
    return {
        "model": str(root / "model"), "dtype": "float32", "skip_tokenizer_init": True, "seed": 0,
        "max_model_len": 4096, "max_num_seqs": 8, "enforce_eager": True,
        "additional_config": {"saeguard": settings},
    }  # fmt: skip


def reading(source: Source, folder: Path) -> dict[str, float]:
    """Return the processor time of one reading, ms: the first, and with one policy changed."""
    known, took = ReadCache(), []
    for i in range(6):
        policy(folder, i, 70.0 + i, 600 + i)
        began = time.process_time()
        told, _ = read(source, known, "files")
        assert told.error is None, told.error
        took.append(1e3 * (time.process_time() - began))
    return {"first": round(took[0], 1), "one_changed": round(min(took[1:]), 1)}


def quantiles(ms: list[float]) -> dict[str, float]:
    """Return how long steps took."""
    found = np.percentile(ms, [50, 99, 100]) if ms else np.zeros(3)
    return {
        "steps": len(ms),
        **dict(zip(("p50", "p99", "max"), np.round(found, 2).tolist(), strict=True)),
    }


def measure(folder: Path, engine: dict[str, Any], swaps: int, pause: float) -> dict[str, Any]:
    """Decode without end, change one policy after the other, and time every step."""
    from vllm import LLM, SamplingParams  # noqa: PLC0415

    llm = LLM(**engine)
    core = llm.llm_engine.engine_core.engine_core
    guard = core.scheduler.saeguard_engine
    reports: list[tuple[float, Any]] = []
    where = guard.reloader._where  # noqa: SLF001 - the moment matters, which no event tells

    def note(report: Any) -> None:
        if report.outcome != "unchanged":  # a second message of one change
            reports.append((time.perf_counter(), report))

    where.report = note
    prompts, names = random_prompts(8, seed=1, shortest=20, longest=40), iter(range(10**9))
    params = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)
    steps: list[tuple[float, float]] = []
    changes: list[tuple[float, str]] = []

    def step() -> None:
        while llm.llm_engine.get_num_unfinished_requests() < len(prompts):
            n = next(names)
            prompt = {"prompt_token_ids": prompts[n % len(prompts)]}
            llm.llm_engine.add_request(str(n), prompt, params)
        began = time.perf_counter()
        llm.llm_engine.step()
        steps.append((began, time.perf_counter() - began))

    deadline = time.perf_counter() + 60
    while not guard.reloader.status.outcomes and time.perf_counter() < deadline:
        step()  # the process that compiles has started and read everything once
    for _ in range(50):
        step()
    steps.clear()
    for i in range(swaps):
        began, known = time.perf_counter(), len(reports)
        while time.perf_counter() - began < pause:
            step()
        kind = "rows" if i % 2 else "threshold"
        changes.append((time.perf_counter(), kind))
        policy(folder, i, 60.0 + i, 600 + i if i % 2 else i)
        while len(reports) == known:
            step()
        step()
    return account(changes, reports, steps)


def account(
    changes: list[tuple[float, str]],
    reports: list[tuple[float, Any]],
    steps: list[tuple[float, float]],
) -> dict[str, Any]:
    """Set the steps in which a reload was under way beside all others."""
    spans = [(began, end) for (began, _), (end, _) in zip(changes, reports, strict=True)]
    around, others = [], []
    for began, took in steps:
        during = any(began <= end and began + took >= first for first, end in spans)
        (around if during else others).append(1e3 * took)
    by_kind = {
        kind: [r for (_, k), (_, r) in zip(changes, reports, strict=True) if k == kind]
        for kind in ("threshold", "rows")
    }
    assert all(r.outcome == "active" for _, r in reports), reports
    return {
        "step_ms_while_reloading": quantiles(around),
        "step_ms_otherwise": quantiles(others),
        "worst_step_of_each_reload_ms": [
            round(max(1e3 * t for b, t in steps if b <= end and b + t >= first), 2)
            for first, end in spans
        ],
        "reloads": {
            kind: {
                "count": len(found),
                "read_ms": quantiles([r.read_ms for r in found]),
                "swap_ms": quantiles([r.swap_ms for r in found]),
                "rows": sorted({r.encoder_rows for r in found}),
            }
            for kind, found in by_kind.items()
        },
        "file_to_use_ms": quantiles([1e3 * (end - first) for first, end in spans]),
    }


def main() -> None:
    """Run it, print what it showed, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policies", type=int, default=1000)
    parser.add_argument("--swaps", type=int, default=20)
    parser.add_argument("--pause", type=float, default=2.0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "reload.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        engine = build(root, options.policies)
        cost = reading(Source(root / "policies", root / "sets"), root / "policies")
        result = measure(root / "policies", engine, options.swaps, options.pause)
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "load": os.getloadavg()[0],
        "vllm": version("vllm-cpu"),
        "policies": options.policies,
        "batch": 8,
        "reading_cpu_ms": cost,
        **result,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    Console().print_json(data=result)


if __name__ == "__main__":
    main()
