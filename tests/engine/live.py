"""Child process of the engine tests: one engine that serves one mix of requests after another.

`python -m tests.engine.live ENGINE.json FD`: reads a mix a line from the socket `FD` and answers
each with a line: what became of every request, in the engine core's own words.
"""

from __future__ import annotations

import itertools
import json
import socket
import sys
import time
from pathlib import Path
from typing import Any, TextIO

NAMES = itertools.count()


def record_ends() -> dict[str, dict[str, Any]]:
    """Note of each request the tokens that the engine core holds as it ends, and why it does."""
    from saeguard.vllm.engine import EngineGuard

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
                "enforced": (request.sampling_params.extra_args or {}).get("saeguard_enforce"),
            }
        return said

    EngineGuard.finish = recording  # type: ignore[method-assign]
    return ended


def serve(engine: Any, mix: list[dict[str, Any]]) -> int:
    """Serve one mix to its end; return the most tokens that any request read from the cache.

    Each request of the mix holds the step it comes in, prompt token ids, sampling parameters, and
    after how many further steps its client goes away, if it does: before a step, or in its middle,
    when the forward has run and the scheduler has not looked at it, as in an engine core's own
    process.
    """
    from vllm import SamplingParams

    waiting = sorted(mix, key=lambda request: request["step"])
    leaves: dict[int, list[str]] = {}
    aborts = engine.engine_core.engine_core.aborts_queue
    cached, step = 0, 0
    while waiting or engine.has_unfinished_requests():
        while waiting and waiting[0]["step"] <= step:
            request, name = waiting.pop(0), str(next(NAMES))
            prompt = {"prompt_token_ids": request["prompt"]}
            if request.get("salt"):
                prompt["cache_salt"] = request["salt"]
            engine.add_request(name, prompt, SamplingParams(**request["params"]))
            if request.get("leaves") is not None:
                leaves.setdefault(step + request["leaves"], []).append(name)
        if step in leaves and step % 2:
            engine.abort_request(leaves.pop(step))
        elif step in leaves:
            ids = engine.output_processor.abort_requests(leaves.pop(step), internal=False)
            aborts.put_nowait(ids)
        for output in engine.step():
            cached = max(cached, output.num_cached_tokens or 0)
        step += 1
    return cached


def answer(engine: Any, ended: dict[str, dict[str, Any]], asked: dict[str, Any]) -> dict[str, Any]:
    """Serve one mix, and wait until its events are written."""
    core = engine.engine_core.engine_core
    guard = core.scheduler.saeguard
    ended.clear()
    if asked.get("reset"):
        core.reset_prefix_cache()
    cached = serve(engine, asked["mix"])
    core.step()  # lets the worker know what has finished
    while guard.sink.written + guard.sink.dropped < guard.sink.produced:
        time.sleep(0.001)
    return {
        "ended": ended,
        "cached": cached,
        "left": len(guard.ledger),
        "dropped": guard.sink.dropped,
        "memory": len(guard.memory),
    }


def main(job: Path, stream: TextIO) -> None:
    """Build the engine, say so, and serve until the other side hangs up."""
    ended = record_ends()
    from vllm import LLM

    engine = LLM(**json.loads(job.read_text())).llm_engine
    print(json.dumps({"ready": True}), file=stream, flush=True)
    for line in stream:
        print(json.dumps(answer(engine, ended, json.loads(line))), file=stream, flush=True)
    engine.engine_core.engine_core.scheduler.shutdown()


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[2])) as connection, connection.makefile("rw") as lines:
        main(Path(sys.argv[1]), lines)
