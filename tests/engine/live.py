"""Child process of the engine tests: one engine that serves one mix of requests after another.

`python -m tests.engine.live ENGINE.json FD`: reads from the socket `FD` what to do, one thing a
line, and answers each with a line: what came out, and what became of every request in the engine
core's own words.
"""

from __future__ import annotations

import itertools
import json
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from tests.engine import child

NAMES = itertools.count()


def record_ends() -> dict[str, dict[str, Any]]:
    """Note of each request the tokens that the engine core holds as it ends, and why it does."""
    from saeguard.vllm.engine_core.guard import EngineGuard

    ended: dict[str, dict[str, Any]] = {}
    finish = EngineGuard.finish

    def recording(self: Any, request_id: str, reason: str) -> Any:
        request = self.requests.get(request_id)
        said = finish(self, request_id, reason)
        if request is not None:
            ended[request_id] = {
                "prompt": request.num_prompt_tokens,
                "tokens": list(request.all_token_ids),
                "why": reason,
                "stop_reason": request.stop_reason,
                "preempted": request.num_preemptions,
                "adapter": request.lora_request and request.lora_request.lora_name,
                "enforced": (request.sampling_params.extra_args or {}).get("saeguard_enforce"),
            }
        return said

    EngineGuard.finish = recording  # type: ignore[method-assign]
    return ended


def serve(
    llm: Any, mix: list[dict[str, Any]], between: dict[str, str] | None = None
) -> tuple[dict[str, Any], int]:
    """Serve one mix to its end; return what clients got, and the most tokens read from the cache.

    Args:
        llm: the engine.
        mix: each request holds the step it comes in, prompt token ids, sampling parameters, and
            after how many further steps its client goes away, if it does: before a step, or in
            its middle, when the forward has run and the scheduler has not looked at it, as in an
            engine core's own process.
        between: by step, what of `BETWEEN` to do before it, with requests under way.
    """
    engine = llm.llm_engine
    waiting = sorted(mix, key=lambda request: request["step"])
    leaves: dict[int, list[str]] = {}
    aborts = engine.engine_core.engine_core.aborts_queue
    said: dict[str, Any] = {}
    cached, step = 0, 0
    while waiting or engine.has_unfinished_requests():
        while waiting and waiting[0]["step"] <= step:
            request, name = waiting.pop(0), str(next(NAMES))
            add(engine, name, request)
            if request.get("leaves") is not None:
                leaves.setdefault(step + request["leaves"], []).append(name)
        if between and str(step) in between:
            BETWEEN[between[str(step)]](llm)
        if step in leaves and step % 2:
            engine.abort_request(leaves.pop(step))
        elif step in leaves:
            ids = engine.output_processor.abort_requests(leaves.pop(step), internal=False)
            aborts.put_nowait(ids)
        for output in engine.step():
            cached = max(cached, output.num_cached_tokens or 0)
            said.setdefault(output.request_id, []).extend(ends(output))
        step += 1
    return said, cached


def ends(output: Any) -> list[dict[str, Any]]:
    """Return the choices that an output of a request finishes, as its client gets them."""
    return [
        {
            "text": choice.text,
            "tokens": list(choice.token_ids),
            "why": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            "cached": output.num_cached_tokens,
            "saeguard": child.said(choice),
        }
        for choice in output.outputs
        if choice.finish_reason is not None
    ]


def add(engine: Any, name: str, request: dict[str, Any]) -> None:
    """Hand one request of a mix to the engine."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import StructuredOutputsParams

    prompt = embeds(request) if "embeds" in request else {"prompt_token_ids": request["prompt"]}
    if request.get("salt"):
        prompt["cache_salt"] = request["salt"]
    params = dict(request["params"])
    if "structured_outputs" in params:
        params["structured_outputs"] = StructuredOutputsParams(**params["structured_outputs"])
    adapter = request.get("adapter")
    engine.add_request(
        name,
        prompt,
        SamplingParams(**params),
        lora_request=LoRARequest(*adapter) if adapter else None,
    )


def embeds(request: dict[str, Any]) -> dict[str, Any]:
    """Return a prompt of embeddings, or of token ids and embeddings."""
    import torch

    prompt = {"type": "embeds", "prompt_embeds": torch.tensor(request["embeds"])}
    if request["ids"] is not None:
        prompt |= {"prompt_token_ids": request["ids"], "is_token_ids": request["is_token"]}
    return prompt


def sleep(llm: Any) -> None:
    """Sleep with the requests under way kept, and wake up."""
    llm.sleep(level=1, mode="keep")
    assert llm.llm_engine.is_sleeping()
    llm.wake_up()


def fail(llm: Any) -> None:
    """Let the oldest request end in error, as one whose grammar cannot be compiled does."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    scheduler.grammar_compile_error_reqs.add(scheduler.running[0].request_id)


def session(llm: Any) -> None:
    """Ask for a request whose prompt comes in parts, which the guard must refuse."""
    from saeguard.vllm.engine_core import selftest
    from saeguard.vllm.engine_core.hooks import SessionError

    core = llm.llm_engine.engine_core.engine_core
    request = selftest._request(core, "session")
    request.resumable = True
    try:
        core.preprocess_add_request(request)
    except SessionError:
        return
    raise AssertionError("a session was taken")


BETWEEN: dict[str, Callable[[Any], Any]] = {
    "reset": lambda llm: llm.reset_prefix_cache(reset_running_requests=True),
    "sleep": sleep,
    "forget": lambda llm: (
        llm.llm_engine.engine_core.engine_core.scheduler.saeguard_engine.prefix_store.clear()
    ),
    "fail": fail,
    "session": session,
}


def beams(llm: Any, prompts: list[list[int]], width: int, tokens: int) -> str | None:
    """Search with beams; return why that is refused, None if it is not."""
    from vllm.sampling_params import BeamSearchParams

    try:
        llm.beam_search(
            [{"prompt_token_ids": p} for p in prompts],
            BeamSearchParams(beam_width=width, max_tokens=tokens, ignore_eos=True),
        )
    except ValueError as error:
        return str(error)
    return None


def answer(llm: Any, ended: dict[str, dict[str, Any]], asked: dict[str, Any]) -> dict[str, Any]:
    """Do one thing, and wait until the events of what it served are written."""
    from saeguard.guard.tap import TAPS

    core = llm.llm_engine.engine_core.engine_core
    guard = core.scheduler.saeguard_engine
    ended.clear()
    said, cached = None, 0
    if asked["what"] == "beams":
        said = beams(llm, asked["prompts"], asked["width"], asked["tokens"])
    elif asked["what"] == "mix":
        if asked.get("reset"):
            core.reset_prefix_cache()
        said, cached = serve(llm, asked["mix"], asked.get("between"))
    else:
        BETWEEN[asked["what"]](llm)
    remembered = len(guard.prefix_store)
    for _ in range(1 + 2 * core.batch_queue_size):  # the worker learns what has finished
        core.step_fn()
    sink = guard.telemetry.sink
    while sink.written + sink.dropped < sink.produced:
        time.sleep(0.001)
    return {
        "said": said,
        "ended": ended,
        "cached": cached,
        "left": sum(len(v.ledger) for v in guard.versions.live),
        "lists": len(guard.versions.live),
        "clamps": max((len(tap.clamps) for tap in TAPS.values()), default=None),
        "dropped": sink.dropped,
        "memory": remembered,
        "scheduler": type(core.scheduler).__name__,
    }


def main(job: Path, stream: TextIO) -> None:
    """Build the engine, say so, and serve until the other side hangs up."""
    ended = record_ends()
    from vllm import LLM

    llm = LLM(**json.loads(job.read_text()))
    child.ready()
    print(json.dumps({"ready": True}), file=stream, flush=True)
    for line in stream:
        print(json.dumps(answer(llm, ended, json.loads(line))), file=stream, flush=True)
    llm.llm_engine.engine_core.engine_core.scheduler.shutdown()


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[2])) as connection, connection.makefile("rw") as lines:
        child.run(main, Path(sys.argv[1]), lines)
