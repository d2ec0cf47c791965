"""One engine and the guards that take turns on it, for `benchmarks/overhead.py`."""

from __future__ import annotations

import functools
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from benchmarks.overhead_model import TINY, VOCABULARY, Size, make_model, make_policies, make_sae
from saeguard.guard import tap as tapping
from saeguard.guard.install_taps import install_taps
from saeguard.guard.tap import TAPS, Tap
from saeguard.guard.watchlist import clamps_digest
from saeguard.reload.worker_updates import Admitted
from saeguard.vllm.attributes import ENGINE_GUARD, WORKER_GUARD
from saeguard.vllm.engine_core.guard import EngineGuard
from saeguard.vllm.engine_core.pending_passes import PendingPasses
from saeguard.vllm.engine_core.prefix_cache import prefix_store_of
from saeguard.vllm.startup import start
from saeguard.vllm.worker.guard import WorkerGuard

MAX_LENGTH = 544
IDLE = "idle"
STATES = (IDLE, "idle again", "armed", "firing", "clamping")
MEANING = {
    IDLE: "plugin installed, no policy loaded",
    "idle again": "the same once more: how far apart two equal states look here",
    "armed": "8 policies on 32 latents, none fires",
    "firing": "the same policies, firing on most tokens",
    "clamping": "the same, and a policy that clamps 4 latents from an early token on",
}
PARTS = (
    "worker.before",
    "op",
    "worker.after",
    "collect",
    "engine.rules",
    "engine.finish",
)
"""Host time by part; `engine.finish` comes once a request, the others on each step."""
SPENT: dict[str, int] = defaultdict(int)
"""Nanoseconds by part since it was cleared."""


@dataclass(frozen=True)
class Guards:
    """All that makes the engine's process guarded in one way; empty where it is idle."""

    taps: Mapping[int, Tap]
    worker: WorkerGuard | None = None
    engine: EngineGuard | None = None


@dataclass(frozen=True)
class Bench:
    """The engine and the guards that take turns on it."""

    llm: Any
    guards: Mapping[str, Guards]

    @property
    def core(self) -> Any:
        """The engine core of vLLM, in this process."""
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def runner(self) -> Any:
        """The model runner of vLLM."""
        return self.core.model_executor.driver_worker.worker.model_runner

    def switch(self, state: str) -> None:
        """Guard the requests in flight in another way from the next step on."""
        guards = self.guards[state]
        TAPS.clear()
        TAPS.update(guards.taps)
        setattr(self.runner, WORKER_GUARD.name, guards.worker)  # None where it is idle
        setattr(self.core.scheduler, ENGINE_GUARD.name, guards.engine)
        if guards.engine is not None:
            versions = guards.engine.versions
            for name, request in self.core.scheduler.requests.items():
                # Steps under other guards are no gaps: the guard would be in place all along.
                state = versions[name].ledger.save(name)
                state.state.requests["next"] = request.num_computed_tokens
                versions[name].ledger.restore(name, state)

    def start(self, batch: int, tokens: int) -> list[str]:
        """Admit a batch of requests, run their prompts, and announce them to every guard."""
        from vllm import SamplingParams  # noqa: PLC0415 - after the environment is set

        self.switch(IDLE)
        rng = random.Random(batch)
        params = SamplingParams(max_tokens=MAX_LENGTH - tokens, temperature=0, ignore_eos=True)
        for i in range(batch):
            prompt = {"prompt_token_ids": [rng.randrange(3, VOCABULARY) for _ in range(tokens)]}
            self.llm.llm_engine.add_request(str(i), prompt, params)
        requests = self.core.scheduler.requests
        while len(requests) < batch or any(
            r.num_computed_tokens < r.num_prompt_tokens for r in requests.values()
        ):
            self.step()
        for guards in self.guards.values():
            for name, request in requests.items():
                if guards.engine is not None and guards.worker is not None:
                    guards.engine.admit(request, None)
                    settled = guards.engine.admitted[name]
                    admitted = Admitted(settled.clamps, settled.enforced)
                    guards.worker.announced[name] = (request.num_prompt_tokens, admitted)
        return list(requests)

    def step(self) -> float:
        """Run one step of the engine core; return its seconds."""
        begin = time.perf_counter()
        _, executed = self.core.step_fn()
        self.core.post_step(model_executed=executed)
        return time.perf_counter() - begin

    def stop(self, names: list[str]) -> dict[str, dict[str, int]]:
        """End every request under every guard; return the verdicts of each by outcome."""
        self.switch(IDLE)
        said: dict[str, dict[str, int]] = {}
        for state, guards in self.guards.items():
            if guards.engine is None or guards.worker is None:
                continue
            said[state] = defaultdict(int)
            for name in names:
                requests = self.core.scheduler.requests
                verdicts = guards.engine.versions[name].ledger.finish(
                    name, requests[name].num_tokens, forget=False
                )
                for verdict in verdicts:
                    said[state][verdict.outcome] += 1
            SPENT.clear()
            for name in names:
                guards.engine.finish(name, "length")
            said[state]["finish_ns"] = SPENT["engine.finish"] // len(names)
            guards.worker.release(names)
        self.llm.llm_engine.abort_request(names, internal=True)
        while self.core.scheduler.has_requests():
            self.step()
        return said


@contextmanager
def timed_parts() -> Iterator[None]:
    """Add up the host time of each part of the guard, in every state alike."""

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter_ns()
            try:
                return function(*args, **kwargs)
            finally:
                SPENT[part] += time.perf_counter_ns() - begin

        return wrapper

    methods: list[tuple[type, str, str]] = [
        (WorkerGuard, "begin_pass", "worker.before"),
        (WorkerGuard, "end_pass", "worker.after"),
        (WorkerGuard, "collect", "collect"),
        (PendingPasses, "push", "engine.rules"),
        (PendingPasses, "roll_back", "engine.rules"),
        (EngineGuard, "finish", "engine.finish"),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in methods]
    for owner, name, part in methods:
        setattr(owner, name, timed(part, getattr(owner, name)))
    key = "CompositeExplicitAutograd"
    tapping._library.impl("tap", timed("op", tapping._tap), key, allow_override=True)  # noqa: SLF001
    try:
        yield
    finally:
        for owner, name, function in originals:
            setattr(owner, name, function)


def build(root: Path, size: Size) -> tuple[Bench, dict[str, Any]]:
    """Make the model, the SAE and the policies; start vLLM; prepare a guard for each state."""
    parameters = make_model(root / "model", size)
    sae = make_sae(root / "sae", size)
    settings = {s: make_policies(root, s, sae, size) for s in ("armed", "firing", "clamping")}
    from vllm import LLM  # noqa: PLC0415 - after the environment is set

    llm = LLM(
        str(root / "model"),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=MAX_LENGTH,
        max_num_seqs=32,
        async_scheduling=False,
        enforce_eager=size == TINY,  # compiling is what takes long
        seed=0,
        disable_log_stats=True,
        additional_config={"saeguard": settings["clamping"].model_dump(exclude_none=True)},
    )
    bench = Bench(llm, {})
    first = WORKER_GUARD.get(bench.runner)
    assert first is not None
    slots = len(first.free) + len(first.slots)
    guards = {IDLE: Guards({}), "idle again": Guards({})}
    for state, wanted in settings.items():
        started = start(wanted)
        watchlist = started.watchlist
        taps = install_taps(
            watchlist, max_tokens=len(first.taps[0].f), slots=slots, device=first.device
        )
        worker = WorkerGuard(
            watchlist=watchlist,
            taps=taps,
            rows=taps[0].rows,
            eligible_ids=first.eligible_ids,
            device=first.device,
            free=list(range(1, slots + 1))[::-1],
            clamp_lists={clamps_digest(watchlist): watchlist},
            tested=True,
        )
        prefix_store = prefix_store_of(bench.core.scheduler, watchlist, wanted)
        guards[state] = Guards(
            dict(TAPS), worker, EngineGuard(started, wanted, "bench", prefix_store=prefix_store)
        )
    about = {
        "parameters": parameters,
        "watch_list": {
            "policies": {
                s: len(g.engine.watchlist.policies) for s, g in guards.items() if g.engine
            },
            "latents": len(size.watched),
            "d_sae": size.latents,
        },
        "compilation": str(llm.llm_engine.vllm_config.compilation_config.mode),
        "kv_cache_gib": os.environ["VLLM_CPU_KVCACHE_SPACE"],
        "block_steps_interleaved": True,
    }
    return Bench(llm, guards), about
