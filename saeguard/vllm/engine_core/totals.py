"""Report running totals to an API server once a second, also without requests.

A request's output carries them, too. But without traffic, no output would report that a policy
file was refused, that events are written, or that the guard lives.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import structlog

from saeguard.vllm.engine_core.guard import EngineGuard
from saeguard.vllm.messages import COUNTS, KEY, TOTALS
from saeguard.vllm.patches import assumes, reads

log = structlog.get_logger("saeguard")

EVERY_S = 1.0
"""Seconds between reports."""
FIRST = 0
"""The API server that gets them. Sums over API servers are what counts."""

reads(
    "vllm.v1.engine:EngineCoreOutput",
    "request_id",
    "kv_transfer_params",
    why="running totals travel in an output of no request",
)
assumes(
    "what is put into `EngineCoreProc.output_queue` as `(client, EngineCoreOutputs)` reaches that "
    "API server's client, from any thread",
    why="running totals are reported without traffic",
)


def begin(core: Any, guard: EngineGuard) -> None:
    """Start to report, if the engine core has a process of its own; called after the self-test.

    An offline command has no `/metrics`.
    """
    queue = getattr(core, "output_queue", None)
    if queue is None or guard.settings.read:
        return
    threading.Thread(target=_run, args=(queue, guard), name="saeguard-totals", daemon=True).start()


def _run(queue: Any, guard: EngineGuard) -> None:
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

    failed = ""
    while not guard.closed:
        try:
            counts = guard.changed_totals(at_once=True)
            carrier = EngineCoreOutput(
                request_id=TOTALS, new_token_ids=[], kv_transfer_params={KEY: {COUNTS: counts}}
            )
            queue.put_nowait((FIRST, EngineCoreOutputs(outputs=[carrier])))
            failed = ""
        except Exception as error:
            if repr(error) != failed:  # once for each reason, not once a second
                log.exception("saeguard: the running totals could not be reported; trying again")
            failed = repr(error)
        time.sleep(EVERY_S)
