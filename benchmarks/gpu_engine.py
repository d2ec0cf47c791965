"""Child of `benchmarks/gpu.py`: one vLLM engine, which is asked through a pipe and answers.

Requests are lines of JSON on standard input, answers lines on what standard output was; whatever
else is printed goes to the log. The engine runs in this process, not in one of its own, so that
events can be recorded around its graphs.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import structlog
import torch

from benchmarks.gpu_guarded import gaps, look_at
from benchmarks.gpu_process import end_with_parent
from benchmarks.gpu_record import Record

PROMPT, EDGE = 8, 4
"""Tokens of a prompt that is timed; steps at either end of a block that are not counted."""
NOTED: list[dict[str, Any]] = []
"""What the guard logged."""


class Marks:
    """CUDA events around a step's graphs, and around all that a step launches.

    The first is the device's own time; the second holds what the device waits for the host, too.
    """

    def __init__(self, runner: Any) -> None:
        """Put them around every replay of this process, and around the runner's methods."""
        self.step = -1
        self.pairs: list[tuple[int, str, Any, Any]] = []
        self.replays = 0
        replay = torch.cuda.CUDAGraph.replay

        def marked(graph: Any) -> None:
            self.replays += self.step >= 0
            self._around("graph", lambda: replay(graph))

        torch.cuda.CUDAGraph.replay = marked  # type: ignore[method-assign]
        begun: list[Any] = []
        execute, sample = runner.execute_model, runner.sample_tokens

        def executing(*args: Any, **kwargs: Any) -> Any:
            begun[:] = [_event()]
            return execute(*args, **kwargs)

        def sampling(*args: Any, **kwargs: Any) -> Any:
            result = sample(*args, **kwargs)
            if begun and self.step >= 0:
                self.pairs.append((self.step, "device", begun.pop(), _event()))
            return result

        runner.execute_model, runner.sample_tokens = executing, sampling

    def _around(self, what: str, work: Callable[[], Any]) -> None:
        if self.step < 0:
            work()
            return
        begin = _event()
        work()
        self.pairs.append((self.step, what, begin, _event()))

    def take(self, first: int, last: int, steps: int) -> Record:
        """Return median microseconds of the steps `[first, last)`; forget all that was recorded."""
        torch.cuda.synchronize()
        sums: dict[str, dict[int, float]] = {"graph": {}, "device": {}}
        for step, what, begin, end in self.pairs:
            if first <= step < last:
                sums[what][step] = sums[what].get(step, 0.0) + 1e3 * begin.elapsed_time(end)
        self.pairs.clear()
        told: Record = {"replays_a_step": round(self.replays / steps, 2)}
        self.replays, self.step = 0, -1
        for what, by_step in sums.items():
            told[f"{what}_us"] = round(statistics.median(by_step.values()), 2) if by_step else None
        return told


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class Engine:
    """vLLM with one guard or none, and what is asked of it."""

    def __init__(self, spec: Record) -> None:
        """Start vLLM; a guarded one runs its self-test."""
        structlog.configure(processors=[_note, *structlog.get_config()["processors"]])
        self.spec, self.served = spec, 0
        self.tokens: list[list[int]] = []
        self.parts: dict[str, int] = {}
        self.held = ExitStack()
        if "additional_config" in spec["engine"]:
            from benchmarks import overhead_engine  # noqa: PLC0415 - sets the environment

            self.parts = overhead_engine.SPENT
            self.held.enter_context(overhead_engine.timed_parts())
        from vllm import LLM  # noqa: PLC0415 - after the environment is set

        began = time.monotonic()
        self.llm = LLM(**spec["engine"])
        self.seconds = round(time.monotonic() - began, 1)
        core = self.llm.llm_engine.engine_core.engine_core
        runner = core.model_executor.driver_worker.worker.model_runner
        self.runner = type(runner).__module__
        self.marks = Marks(runner) if torch.cuda.is_available() else None

    def about(self) -> Record:
        """Return how the engine runs, and what the self-test found."""
        config = self.llm.llm_engine.vllm_config
        tests = [n for n in NOTED if n["event"] == "saeguard self-test"]
        ready = [n for n in NOTED if n["event"] == "saeguard ready"]
        return {
            "start_s": self.seconds,
            "runner": self.runner,
            "graphs": config.compilation_config.cudagraph_mode.name,
            "compilation": config.compilation_config.mode.name,
            "self_test": [
                {key: n[key] for key in ("layer", "difference", "allowed")} for n in tests
            ],
            **{k: v for n in ready for k, v in n.items() if k in {"held_mib", "pass_us"}},
        }

    def greedy(self, _request: Record) -> Record:
        """Return greedy tokens of all prompts, and what the guard says of each."""
        from vllm import SamplingParams  # noqa: PLC0415 - after the environment is set

        params = SamplingParams(
            temperature=0,
            max_tokens=self.spec["answer"],
            stop_token_ids=[self.spec["eos"]],
            detokenize=False,
        )
        prompts = [{"prompt_token_ids": ids} for ids in self.spec["prompts"]]
        outputs = [out.outputs[0] for out in self.llm.generate(prompts, params, use_tqdm=False)]
        self.tokens = [list(out.token_ids) for out in outputs]
        return {"tokens": self.tokens, "said": _said(outputs)}

    def clamp(self, _request: Record) -> Record:
        """Compare the greedy tokens with Transformers', clamped and not, on this device."""
        if not self.tokens:
            self.greedy({})
        model, sae = look_at(Path(self.spec["engine"]["model"])), Path(self.spec["sae"])
        texts = list(zip(self.spec["prompts"], self.tokens, strict=True))
        dtype = self.spec["engine"]["dtype"]
        with_, without = (gaps(model, sae, texts, dtype, clamp=clamp) for clamp in (True, False))
        return {
            "tokens": sum(map(len, with_)),
            "not_likeliest": sum(gap > 0 for text in with_ for gap in text),
            "worst_gap": max((gap for text in with_ for gap in text), default=0.0),
            "unclamped_gaps": [max(text, default=0.0) for text in without],
        }

    def steps(self, request: Record) -> Record:
        """Serve a batch and return medians of its decode steps."""
        from vllm import SamplingParams  # noqa: PLC0415 - after the environment is set

        engine, batch, count = self.llm.llm_engine, request["batch"], request["steps"]
        rng = random.Random(request["seed"])
        params = SamplingParams(
            temperature=0, max_tokens=count + 2 * EDGE, ignore_eos=True, detokenize=False
        )
        for i in range(batch):
            ids = [rng.randrange(3, self.spec["vocabulary"]) for _ in range(PROMPT)]
            engine.add_request(f"{self.served}-{i}", {"prompt_token_ids": ids}, params)
        self.served += 1
        self.parts.clear()
        walls, outputs = [], []
        while engine.has_unfinished_requests():
            if self.marks is not None:
                self.marks.step = len(walls)
            began = time.perf_counter()
            done = engine.step()
            walls.append(time.perf_counter() - began)
            outputs += [out.outputs[0] for out in done if out.finished]
        first, last = EDGE, len(walls) - EDGE
        told = {
            "step_us": round(1e6 * statistics.median(walls[first:last]), 1),
            "steps": len(walls),
        }
        if self.parts:
            told["parts_us"] = {
                p: round(ns / 1e3 / (batch if p == "engine.finish" else len(walls)), 1)
                for p, ns in self.parts.items()
            }
        if self.marks is not None:
            told |= self.marks.take(first, last, len(walls))
        return {**told, "said": _said(outputs)}


def _said(outputs: list[Any]) -> Record:
    """Return how many responses the guard judged, flagged, and clamped."""
    said = [told for out in outputs if (told := getattr(out, "saeguard", None))]
    return {
        "responses": len(outputs),
        "judged": len(said),
        "flagged": sum(bool(told["flagged"]) for told in said),
        "clamped": sum(told["action"] == "clamp" for told in said),
        "errors": sum(bool(told["errors"]) for told in said),
    }


def _note(_logger: Any, _method: str, event: Any) -> Any:
    NOTED.append(dict(event))
    return event


def main(spec: Path) -> None:
    """Start the engine, then do what is asked until the input ends."""
    end_with_parent()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.manual_seed(0)

    def answer(work: Callable[[], Record]) -> None:
        try:
            told = work()
        except Exception:  # noqa: BLE001 - the parent writes it down, and asks something else
            traceback.print_exc()
            told = {"error": traceback.format_exc()[-3000:]}
        answers.write(json.dumps(told) + "\n")
        answers.flush()

    engines: list[Engine] = []

    def begin() -> Record:
        engines.append(Engine(json.loads(spec.read_text())))
        return engines[0].about()

    answer(begin)
    for line in sys.stdin if engines else ():
        request = json.loads(line)
        answer(partial(getattr(engines[0], request["do"]), request))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
