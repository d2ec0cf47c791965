"""Add the running totals that engine cores report without traffic to this process' metrics."""

from __future__ import annotations

from typing import Any

from saeguard.events.metrics import show
from saeguard.vllm.messages import COUNTS, KEY, TOTALS
from saeguard.vllm.patches import Original, assumes, patch, reads

reads("vllm.v1.engine:EngineCoreOutputs", "outputs", why="running totals travel in an output")
assumes(
    "`AsyncLLM` takes outputs from `get_output_async` before the first request, and outputs "
    "without requests do nothing",
    why="running totals are reported without traffic",
)


@patch(
    "vllm.v1.engine.core_client:AsyncMPClient.get_output_async",
    why="running totals reach `/metrics` without traffic, and vLLM's statistics do not count them",
)
async def get_output(original: Original, _client: Any) -> Any:
    """Take running totals out of what an engine core sends."""
    outputs = await original()
    for output in outputs.outputs:
        if output.request_id == TOTALS:
            show(output.kv_transfer_params[KEY][COUNTS])
    if any(output.request_id == TOTALS for output in outputs.outputs):
        outputs.outputs = [o for o in outputs.outputs if o.request_id != TOTALS]
    return outputs
