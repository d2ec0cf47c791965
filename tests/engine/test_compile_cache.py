"""vLLM keeps compiled graphs on disk: none without the tap serves a guarded engine.

vLLM 0.32's CPU build cannot load its own artefacts (`finalize_loading`) and compiles again. Here
that is cured in the child, so that they are loaded as on other platforms.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests import models
from tests.engine import engines
from tests.engine.test_parity import TOLERANCE, check_verdicts, compare

pytestmark = pytest.mark.engine

LOADING = """
import torch
load = torch.compiler.load_compiled_function

def loading(*args, **kwargs):
    loaded = load(*args, **kwargs)
    loaded._artifacts.compiled_fn.finalize_loading = lambda config: None
    return loaded

torch.compiler.load_compiled_function = loading
"""
SAME_HASH = """
from vllm.config import VllmConfig
compute_hash = VllmConfig.compute_hash

def without_the_digest(self, *args, **kwargs):
    kept, self.additional_config = self.additional_config, {}
    try:
        return compute_hash(self, *args, **kwargs)
    finally:
        self.additional_config = kept

VllmConfig.compute_hash = without_the_digest
"""
LOADED = re.compile(r"Directly load AOT compilation from path \S*/torch_aot_compile/(\w+)/")
REQUESTS = engines.requests(engines.random_prompts(8, seed=41, longest=50))


@dataclass
class Cache:
    """A compile cache of its own, and what was served from it."""

    root: Path
    guarded: models.Guarded
    served: dict[str, engines.Served] = field(default_factory=dict)

    def job(self, name: str, *, guard: bool, same_hash: bool = False) -> dict[str, Any]:
        """Return the arguments of `engines.run` and `engines.serve`."""
        prelude = self.root / f"{name}.prelude"
        prelude.mkdir()
        (prelude / "sitecustomize.py").write_text(
            LOADING + SAME_HASH * same_hash + engines.mutation()
        )
        events = str(self.root / "events.jsonl")  # one path: it is in the hash, as all settings are
        return {
            "folder": self.root / name,
            "engine": {
                "model": str(self.guarded.model),
                "max_num_seqs": 8,
                "additional_config": {"saeguard": self.guarded.settings(events=events)}
                if guard
                else {},
            },
            "batches": [REQUESTS],
            "more": {
                "VLLM_CACHE_ROOT": str(self.root / "cache"),
                "PYTHONPATH": f"{prelude}:{engines.ROOT}",
            },
        }

    def artefacts(self) -> set[str]:
        """Return the names of what is in the cache."""
        return {p.parts[-3] for p in self.root.glob("cache/*/torch_aot_compile/*/*/model")}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Fill a cache without the guard."""
    root = tmp_path_factory.mktemp("compiled")
    cache = Cache(root, models.make_guarded(root))
    cache.served["plain"] = engines.serve(**cache.job("plain", guard=False))
    assert len(cache.artefacts()) == 1
    return cache


def test_a_stale_artefact_is_caught(cache: Cache) -> None:
    """With the digest taken out of the hash vLLM loads the graph without tap; nothing is served."""
    done = engines.run(**cache.job("stale", guard=True, same_hash=True))
    log = done.stdout + done.stderr
    assert LOADED.findall(log) == list(cache.artefacts()), log[-3000:]
    assert done.returncode != 0
    assert "saeguard self-test: " in log
    assert "taken from a stale compile cache" in log


def test_a_guarded_start_after_an_unguarded_one(cache: Cache) -> None:
    """The guard's graph has another hash and a path of its own, and is loaded from there."""
    before = cache.artefacts()
    settings = cache.guarded.settings(events=str(cache.root / "events.jsonl"))
    for name in ("guarded", "guarded again"):
        served = engines.serve(**cache.job(name, guard=True))
        (own,) = cache.artefacts() - before
        assert served.graph != cache.served["plain"].graph
        assert LOADED.findall(served.log) == ([] if name == "guarded" else [own])
        assert compare(served, cache.guarded, settings) < TOLERANCE
        assert check_verdicts(served, cache.guarded, settings) > 40
        outputs = [r["output"] for r in served.results]
        assert outputs == [r["output"] for r in cache.served["plain"].results]


@pytest.mark.slow
def test_an_unguarded_start_after_a_guarded_one(cache: Cache, tmp_path: Path) -> None:
    """Neither its own artefact nor, forced on it, the guard's gives it a tap or other tokens."""
    expected = [r["output"] for r in cache.served["plain"].results]
    own = engines.serve(**cache.job("plain again", guard=False))
    assert LOADED.search(own.log)
    tapped = Cache(tmp_path, cache.guarded)
    engines.serve(**tapped.job("guarded", guard=True, same_hash=True))
    forced = engines.serve(**tapped.job("plain", guard=False, same_hash=True))
    assert LOADED.findall(forced.log) == list(tapped.artefacts())
    for served in (own, forced):
        assert [r["output"] for r in served.results] == expected
        assert all(r["saeguard"] is None for r in served.results)
        assert "saeguard taps installed" not in served.log
