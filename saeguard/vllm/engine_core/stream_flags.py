"""Tell a stream of a policy at the token at which it acts, if its request or the operator asks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from saeguard.vllm.attributes import STREAMED
from saeguard.vllm.messages import FRESH, STREAM_FLAGS
from saeguard.vllm.patches import reads

if TYPE_CHECKING:
    from saeguard.vllm.engine_core.guard import EngineGuard

reads(
    "vllm.sampling_params:SamplingParams",
    "extra_args",
    "output_kind",
    why="which requests are streams that ask for flags",
)


def fresh_flags(guard: EngineGuard, request: Any) -> Mapping[str, Any] | None:
    """Return the response as of now if a policy acts of which the stream has not told.

    Args:
        guard: of the engine core.
        request: vLLM's, in flight.
    """
    params = request.sampling_params
    if params is None or params.output_kind.name != "DELTA":
        return None
    if not (guard.settings.stream_flags or (params.extra_args or {}).get(STREAM_FLAGS)):
        return None
    response = guard.response_so_far(request.request_id)
    told = STREAMED.get(request) or frozenset()
    if response is None:
        return None
    fresh = {v["policy"] for v in response["verdicts"]} - told
    if not fresh:
        return None
    STREAMED.set(request, told | fresh)
    return {**response, FRESH: sorted(fresh)}
