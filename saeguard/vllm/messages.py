"""Names under which the guard's parts in vLLM's processes exchange data.

The packages `worker`, `engine_core` and `api_server` do not import each other.
"""

from __future__ import annotations

from saeguard.errors import CannotRunError

KEY = "saeguard"
"""Names the guard in `--additional-config`, in an output's `kv_transfer_params` (where the engine
core puts a request's verdicts for the API server) and in response bodies."""
COUNTS = "counts"
"""In the verdicts' object: changes of the running totals, which the API server removes."""
TOTALS = "saeguard-totals"
"""Id of the output of no request that carries running totals without traffic."""
MESSAGE = "message"
"""In the verdicts' object: the text that replaces the output of a stopped request."""
STOPPED_BY = "stopped_by"
"""In the verdicts' object: the stop reason, if a policy stopped the request. The API server removes
it. vLLM's own `stop_reason` would not do: a client's stop string can replace or imitate it."""
FRESH = "fresh"
"""In the verdicts' object of a stream under way: the policies that act since the last one. The API
server removes it."""
STOP_REASON = "saeguard:"
"""Prefix of the stop reason of a request that a policy stopped; the policy's name follows."""
VALUES = "values"
"""In the object of a text that an offline command reads: [tokens, features] float32, as bytes."""
STATE = "state"
"""In the same object: [tokens] uint8, what became of each token, as bytes."""

ENFORCE = "saeguard_enforce"
"""In a request's extra arguments: shadow policies that it asks to have enforced."""
STREAM_FLAGS = "saeguard_stream_flags"
"""In a request's extra arguments: 1 if a stream tells of a policy in the chunk at which it acts."""
HOLD_TOOL_CALLS = "saeguard_hold_tool_calls"
"""In a request's extra arguments: 1 if a stream sends tool calls only once the answer is judged."""
TENANT = "saeguard_tenant"
"""In a request's extra arguments: the tenant. The API server overwrites what a client sent."""

AGAINST_BEAMS = "saeguard_against_beams"
"""Method that the guard adds to an engine core, for its clients: the policies that are enforced for
a request and that beam search would evade."""

SELF_TEST = "saeguard-self-test-"
"""Prefix of the self-test's request ids; honoured only until the test has passed."""
EAGER, SERVED = f"{SELF_TEST}eager", f"{SELF_TEST}served"
STALE_GRAPH = (
    "the graph was built without the guard, perhaps taken from a stale compile cache: remove "
    "vLLM's cache directory (VLLM_CACHE_ROOT) and start again."
)


class SelfTestError(CannotRunError):
    """The taps do not read the residual stream, so serving would be unguarded."""
