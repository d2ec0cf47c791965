"""One model on several ranks: one account of each request, and one edit."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import models
from tests.engine import engines, probes, test_clamp
from tests.engine.test_fails_closed import refused, start
from tests.engine.test_parity import TOLERANCE, check_verdicts

pytestmark = [pytest.mark.engine, pytest.mark.ranks]

COUNT, TOKENS = 18, 12
LATENTS = (4, 8, 12, 16, 20, 24)
TENSOR = {"tensor_parallel_size": 2}
PIPELINE = {"pipeline_parallel_size": 2}
"""Of three layers vLLM puts two on the first stage; uncompiled, it fails by itself on a CPU."""


@pytest.fixture(autouse=True)
def _a_core_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each of two ranks a core of its own, which vLLM asks for on a CPU."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(map(str, cores)))


def make(root: Path, family: str = "llama") -> models.Guarded:
    """Make a model with clamps that requests may ask for, beside policies that flag."""
    guarded = test_clamp.guarded_with_clamps(root, family)
    models.write_feature_set(guarded.feature_sets / "tiny.yaml", guarded.sae, latents=LATENTS)
    models.random_policies(guarded.policies, LATENTS)
    return dataclasses.replace(guarded, latents=LATENTS)


def serve_and_check(
    root: Path, guarded: models.Guarded, *, count: int = COUNT, **engine: Any
) -> engines.Served:
    """Serve a mixed batch three times and hold texts, verdicts and events against the reference."""
    served = test_clamp.serve_thrice(
        root, guarded, count=count, longest=100, tokens=TOKENS, **engine
    )
    test_clamp.check(guarded, served, count, TOKENS)
    free = [r for i, r in enumerate(served.results) if test_clamp.enforced(i, count) is None]
    settings = test_clamp.mixed_settings(root, guarded)
    watchlist = engines.compile_policies(settings)
    checked = check_verdicts(dataclasses.replace(served, results=free), guarded, settings)
    assert checked > 0.9 * len(free) * len(watchlist.policies)
    assert any(r["cached"] for r in served.results)
    assert served.left == 0
    lines = (root / "events.jsonl").read_text().splitlines()
    events = [e for e in map(json.loads, lines) if e["event"] == "verdict"]
    told = Counter((e["request_id"], e["policy"]) for e in events)
    assert set(told.values()) == {1}, "each policy concludes once of each request"
    assert len(told) == len(served.results) * len(watchlist.policies)
    return served


@pytest.mark.parametrize("eager", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_tensor_parallel(tmp_path: Path, *, eager: bool) -> None:
    """Two ranks, clamped alike: any other text would come out if one of them were not."""
    served = serve_and_check(tmp_path, make(tmp_path), enforce_eager=eager, **TENSOR)
    assert served.log.count("saeguard ready") == 2


@pytest.mark.slow
def test_tensor_parallel_on_model_runner_v2(tmp_path: Path) -> None:
    """The same on the runner of GPUs, through Triton's interpreter."""
    serve_and_check(tmp_path, make(tmp_path), v2=True, count=6, enforce_eager=True, **TENSOR)


def test_pipeline_parallel(tmp_path: Path) -> None:
    """The hooked and clamped layer ends the first stage, the packets come from the second."""
    served = serve_and_check(tmp_path, make(tmp_path), **PIPELINE)
    assert served.log.count("saeguard ready") == 2
    assert served.log.count("saeguard self-test") == 1


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "stablelm"])
def test_other_blocks_at_the_end_of_a_stage(family: str, tmp_path: Path) -> None:
    """One tensor is sent, or two of which one is a left-over: only the block before can tell."""
    serve_and_check(tmp_path, make(tmp_path, family), **PIPELINE)


@pytest.mark.slow
def test_hook_points_on_two_stages(tmp_path: Path) -> None:
    """One server watches a layer of each stage, and one probe adds up readings of both."""
    model = models.make_model("llama", tmp_path / "model")
    references = {}
    for layer, name in ((0, "early"), (2, "late")):
        sae = models.make_sae(tmp_path / name, layer=layer, seed=layer)
        models.write_feature_set(tmp_path / "sets" / f"{name}.yaml", sae, latents=LATENTS)
        models.write_policy(
            tmp_path / "policies" / f"{name}.yaml",
            id=f"test.{name}",
            feature_set=name,
            detect={f"a{n}": {"feature": f"f{n}", "above": 0.5} for n in LATENTS},
            condition=" or ".join(f"a{n}" for n in LATENTS),
        )
        references[name] = engines.Reference(model, sae, layer)
    guarded = models.Guarded(
        model, tmp_path / "early", tmp_path / "policies", tmp_path / "sets", LATENTS
    )
    settings = guarded.settings(
        events=str(tmp_path / "events.jsonl"), policies=str(probes.add(guarded))
    )
    prompts = engines.random_prompts(12, seed=3, longest=60)
    engine = {"model": str(model), "max_num_seqs": 4, "additional_config": {"saeguard": settings}}
    served = engines.serve(tmp_path / "run", {**engine, **PIPELINE}, [engines.requests(prompts)])
    assert probes.check_against_scan(served, guarded, settings) > 60
    watchlist = engines.compile_policies(settings)
    names = [name.split("/") for name in watchlist.features]
    read = [i for i, (name, _) in enumerate(names) if name != "probes"]
    columns = [watchlist.latents(i)[0][0] for i in read]
    names = [names[i] for i in read]
    assert {name for name, _ in names} == {"early", "late"}
    for result in served.results:
        tokens = [*result["prompt"], *result["output"]][:-1]
        positions, f = served.activations[result["id"]]
        assert positions.tolist() == list(range(len(tokens)))
        latents = {name: r.latents(tokens) for name, r in references.items()}
        expected = np.stack([latents[name][:, int(f[1:])] for name, f in names], axis=1)
        assert np.abs(f[:, columns] - expected).max() < TOLERANCE * expected.max()


@pytest.mark.parametrize(
    ("ranks", "blind"),
    [(TENSOR, 1), pytest.param({**PIPELINE, "enforce_eager": False}, 0, marks=pytest.mark.slow)],
)
def test_a_blind_rank_ends_the_start(ranks: dict[str, Any], blind: int, tmp_path: Path) -> None:
    """A tap that is missing on the rank that vLLM does not listen to is found all the same."""
    prelude = (
        "import torch, saeguard.vllm.worker.attach as w\n"
        "hook = w.hook_layer\n"
        f"w.hook_layer = lambda *a: torch.distributed.get_rank() == {blind} or hook(*a)\n"
    )
    done = start(tmp_path, models.make_guarded(tmp_path), prelude=prelude, engine=ranks)
    refused(done, f"rank {blind}: saeguard self-test: the tap at layer 1 ran 0 times")
    assert f"rank {1 - blind}: saeguard" not in done.stdout + done.stderr


@pytest.mark.slow
def test_ranks_that_judge_each_for_itself_are_refused(tmp_path: Path) -> None:
    """An external launcher runs an engine core on each rank, and events would come twice."""
    engine = {
        **TENSOR,
        "distributed_executor_backend": "external_launcher",
        "model": str((guarded := models.make_guarded(tmp_path)).model),
        "enforce_eager": True,
        "additional_config": {"saeguard": guarded.settings()},
    }
    job = tmp_path / "job.json"
    defaults = {"dtype": "float32", "max_model_len": 256, "seed": 0, "skip_tokenizer_init": True}
    job.write_text(json.dumps({"engine": {**defaults, **engine}, "batches": []}))
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
            "-m", "tests.engine.drive", str(job), str(tmp_path / "out.npz"),
        ],
        cwd=engines.ROOT, env=engines.environment(), capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip
    assert done.returncode != 0
    assert "the external_launcher executor (--distributed-executor-backend)" in done.stderr
