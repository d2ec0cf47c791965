"""Part B of `benchmarks/gpu.py`: vLLM engines of each state, in turns, each in its own process.

The engines of one model runner start together, since most of a start is not the GPU's; then one at
a time is asked, so that nothing else runs on the GPU while it is measured.
"""

from __future__ import annotations

import json
import os
import random
import select
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_process import log_of, start, stop
from benchmarks.gpu_record import CUT, FAILED, HELD, NOT_RUN, Record, append

PART = "engines"
WRITTEN = "guards.json"
STATES = ("plain", "idle", "armed", "firing", "clamping")
"""See docs/gpu.md."""
GUARDED = ("armed", "firing", "clamping")
SAME_TEXT = ("idle", "armed", "firing")
"""States under which a text must be the unguarded engine's, token for token."""
NEAR = {"float32": 0.1, "bfloat16": 1.0, "float16": 0.5}
"""Logits within which two tokens count as equally likely, by dtype: rounding may choose."""
KV_BYTES = 8 << 30
CLOSING_S = 3.0
"""Kept for ending the engines."""


@dataclass(frozen=True)
class Plan:
    """What is to be run."""

    model: Path | None
    """None: one is made."""
    dtype: str
    folder: Path
    out: Path
    states: tuple[str, ...]
    runners: tuple[str, ...]
    batches: tuple[int, ...]
    steps: int
    rounds: int
    prompts: int
    answer: int
    longest: int
    """Tokens of a text, prompt and answer."""
    start_s: float
    """What an engine has to start."""
    together: int
    eager: bool
    gpu: bool

    def pieces(self) -> Iterator[str]:
        """Yield the names of all pieces."""
        for runner in self.runners:
            yield from (f"{runner} {state}, start" for state in self.states)
            if "plain" in self.states:
                yield f"{runner}, tokens"
            if "clamping" in self.states:
                yield f"{runner}, clamp"
            yield f"{runner}, steps"


@dataclass
class Child:
    """An engine's process."""

    process: subprocess.Popen[bytes]
    rest: bytes = b""

    def ask(self, do: str, until: float, **more: Any) -> Record:
        """Return the answer to a request, an `error` if none came in time."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **more}).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            return {"error": "the engine's process has ended"}
        return self.answer(until)

    def answer(self, until: float) -> Record:
        """Return the next answer."""
        assert self.process.stdout is not None
        pipe = self.process.stdout.fileno()
        while b"\n" not in self.rest:
            ready, _, _ = select.select([pipe], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                return {"error": "no answer in time", "late": True}
            piece = os.read(pipe, 1 << 16)
            if not piece:
                return {"error": f"the engine's process ended with status {self.process.wait()}"}
            self.rest += piece
        line, self.rest = self.rest.split(b"\n", 1)
        told: Record = json.loads(line)
        return told


def prepare(plan: Plan) -> subprocess.Popen[Any]:
    """Begin to write what the engines serve; it needs no GPU."""
    command = ["-m", "benchmarks.gpu_guarded", f"--folder={plan.folder}"]
    command += [] if plan.model is None else [f"--model={plan.model}"]
    longest = plan.longest - plan.answer
    command += [f"--prompts={plan.prompts}", f"--longest={longest}"]
    return start(command, log_of(plan.out), {"CUDA_VISIBLE_DEVICES": ""})


def run(plan: Plan, prepared: subprocess.Popen[Any], until: float) -> None:
    """Run the engines of each model runner, one runner after the other."""
    with suppress(subprocess.TimeoutExpired):
        prepared.wait(max(1.0, until - time.monotonic()))
    if stop(prepared) or not (plan.folder / WRITTEN).exists():
        for piece in plan.pieces():
            append(plan.out, part=PART, piece=piece, state=FAILED, error="no policies were written")
        return
    for n, runner in enumerate(plan.runners):
        now = time.monotonic()
        _run_runner(plan, runner, now + (until - now) / (len(plan.runners) - n))


def _run_runner(plan: Plan, runner: str, until: float) -> None:
    """Start the engines of one runner, check them, time them, end them."""
    children: dict[str, Child] = {}
    try:
        for first in range(0, len(plan.states), plan.together):
            some = plan.states[first : first + plan.together]
            children |= _start(plan, runner, some, until - CLOSING_S)
        _tokens(plan, runner, children, until - CLOSING_S)
        _clamp(plan, runner, children, until - CLOSING_S)
        _steps(plan, runner, children, until - CLOSING_S)
    finally:
        for child in children.values():
            stop(child.process, CLOSING_S / 2)


def _close(plan: Plan, piece: str, state: str, **more: Any) -> None:
    append(plan.out, part=PART, piece=piece, state=state, **more)


def _start(plan: Plan, runner: str, states: Sequence[str], until: float) -> dict[str, Child]:
    """Start engines side by side; return those that serve."""
    begun = time.monotonic()
    children = {}
    for state in states:
        _close(plan, f"{runner} {state}, start", "began")
        spec = plan.folder / f"{runner}-{state}.json"
        spec.write_text(json.dumps(_spec(plan, state)))
        command = ["-m", "benchmarks.gpu_engine", str(spec)]
        env = _environment(plan, runner, state)
        children[state] = Child(start(command, log_of(plan.out), env, talks=True))
    serving = {}
    for state, child in children.items():
        piece = f"{runner} {state}, start"
        told = child.answer(min(until, begun + plan.start_s))
        held = "error" not in told and (state not in GUARDED or bool(told["self_test"]))
        append(plan.out, part=PART, piece=piece, case=f"{runner} {state}", held=held, **told)
        _close(plan, piece, HELD if held else CUT if told.get("late") else FAILED)
        if held:
            serving[state] = child
        else:
            stop(child.process, CLOSING_S / 2)
    return serving


def _spec(plan: Plan, state: str) -> Record:
    """Return what a child is told."""
    written = json.loads((plan.folder / WRITTEN).read_text())
    engine: Record = {
        "model": written["model"],
        "dtype": plan.dtype,
        "skip_tokenizer_init": True,
        "max_model_len": plan.longest,
        "max_num_seqs": max(*plan.batches, plan.prompts),
        "enforce_eager": plan.eager,
        "seed": 0,
        "disable_log_stats": True,
    }
    if plan.gpu:
        engine |= {
            "gpu_memory_utilization": 0.05,
            "kv_cache_memory_bytes": KV_BYTES,  # several engines at once: none may take the rest
            "compilation_config": {"cudagraph_capture_sizes": sorted({*plan.batches, 16, 32})},
        }
    if state in GUARDED:
        engine["additional_config"] = {"saeguard": written["guards"][state]}
    more = {key: written[key] for key in ("sae", "prompts", "vocabulary", "eos")}
    return {"engine": engine, "answer": plan.answer, **more}


def _environment(plan: Plan, runner: str, state: str) -> dict[str, str]:
    """Return what is added to a child's environment."""
    # Those that start side by side would write into one another's.
    caches = plan.folder / "caches" / (f"{runner}-{state}" if plan.together > 1 else "shared")
    env = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": str(int(runner == "V2")),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(caches / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "2",
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    if plan.gpu:
        env["TRITON_CACHE_DIR"] = str(caches / "triton")
    else:
        env["VLLM_CPU_KVCACHE_SPACE"] = "1"
    if state == "plain":
        env["VLLM_PLUGINS"] = ""
    return env


def _tokens(plan: Plan, runner: str, children: Mapping[str, Child], until: float) -> None:
    """Compare greedy tokens of each state with the unguarded engine's."""
    piece = f"{runner}, tokens"
    if "plain" not in plan.states:
        return
    if "plain" not in children:
        _close(plan, piece, NOT_RUN, error="there is no unguarded engine to compare with")
        return
    _close(plan, piece, "began")
    plain: list[list[int]] = []
    state = HELD
    for name, child in children.items():
        told = child.ask("greedy", until)
        if "error" in told:
            row = {"held": False, **told}
        else:
            tokens = told.pop("tokens")
            plain = plain or tokens
            same = sum(a == b for a, b in zip(plain, tokens, strict=True))
            row = {"texts": len(tokens), "same": same, **told["said"]}
            alike = same == len(tokens) or name not in SAME_TEXT
            row["held"] = alike and _as_meant(name, row)
        append(plan.out, part=PART, piece=piece, case=f"{runner} {name}", **row)
        if not row["held"]:
            state = CUT if told.get("late") and state == HELD else FAILED
    _close(plan, piece, state)


def _as_meant(state: str, said: Record) -> bool:
    """Return whether responses say what the state's policies must lead to."""
    judged = said["responses"] if state in GUARDED else 0
    fires = {"firing": said["flagged"] > 0, "armed": said["flagged"] == 0}
    clamps = said["clamped"] > 0 if state == "clamping" else said["clamped"] == 0
    return said["judged"] == judged and not said["errors"] and fires.get(state, True) and clamps


def _clamp(plan: Plan, runner: str, children: Mapping[str, Child], until: float) -> None:
    """Compare clamped texts with Transformers on the device."""
    piece = f"{runner}, clamp"
    if "clamping" not in plan.states:
        return
    if "clamping" not in children:
        _close(plan, piece, NOT_RUN, error="there is no engine that clamps")
        return
    _close(plan, piece, "began")
    told = children["clamping"].ask("clamp", until)
    if "error" in told:
        append(plan.out, part=PART, piece=piece, case=f"{runner} clamping", held=False, **told)
        _close(plan, piece, CUT if told.get("late") else FAILED)
        return
    near = NEAR[plan.dtype]
    changed = sum(gap > near for gap in told.pop("unclamped_gaps"))
    row = {**told, "near": near, "texts_changed": changed}
    held = told["worst_gap"] <= near and changed > 0
    append(plan.out, part=PART, piece=piece, case=f"{runner} clamping", held=held, **row)
    _close(plan, piece, HELD if held else FAILED)


def _steps(plan: Plan, runner: str, children: Mapping[str, Child], until: float) -> None:
    """Time blocks of decode steps, the engines in turns, until rounds or time are over."""
    piece = f"{runner}, steps"
    if not children:
        _close(plan, piece, NOT_RUN, error="no engine serves")
        return
    _close(plan, piece, "began")
    rng, state = random.Random(0), HELD
    for round_ in range(plan.rounds + 1):  # in the first, caches fill; it is not counted
        for batch in plan.batches:
            for name in rng.sample(list(children), len(children)):
                if time.monotonic() > until:
                    _close(plan, piece, state if round_ > 1 else CUT, rounds=max(0, round_ - 1))
                    return
                told = children[name].ask(
                    "steps", until, batch=batch, steps=plan.steps, seed=1000 * round_ + batch
                )
                held = "error" not in told and _as_meant(name, told["said"])
                if not held:
                    state = CUT if told.get("late") and state == HELD else FAILED
                case = f"{runner} {name}, batch {batch}, round {round_}"
                about = {"runner": runner, "guard": name, "batch": batch, "round": round_}
                append(plan.out, part=PART, piece=piece, case=case, held=held, **about, **told)
    _close(plan, piece, state, rounds=plan.rounds)
