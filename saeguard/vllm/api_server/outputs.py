"""Patches of the one place that every answer passes, whatever route asked for it.

vLLM's `OutputProcessor` makes the `RequestOutput`s from which every route builds its body: HTTP
routes, gRPC, batch files, `LLM.generate` and `LLM.chat`. So an answer that a policy stopped is
withheld here (text, token ids, probabilities), finishes with `content_filter`, and gives its
verdicts to the client request that it belongs to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from saeguard.events.metrics import show
from saeguard.vllm.api_server.told import TOLD
from saeguard.vllm.api_server.withheld import Stopped
from saeguard.vllm.attributes import CHOICE_VERDICTS, REQUEST_VERDICTS, TOLD_OF
from saeguard.vllm.messages import COUNTS, FRESH, KEY, MESSAGE, STOPPED_BY
from saeguard.vllm.patches import Original, assumes, patch, reads

OUTPUTS = "vllm.v1.engine.output_processor"
FINISH = "content_filter"
"""Finish reason of an answer that a policy stopped; clients and their libraries know it."""
SEPARATOR = "\n\n"
"""Between what a stream has sent and the message that ends it."""

reads(
    "vllm.v1.engine:EngineCoreOutput",
    "kv_transfer_params",
    why="the verdicts of a request travel in it",
)
reads("vllm.outputs:RequestOutput", "outputs", why="the verdict of each choice")
reads(
    "vllm.outputs:CompletionOutput",
    "index",
    "text",
    "token_ids",
    "logprobs",
    "cumulative_logprob",
    "routed_experts",
    "finish_reason",
    "stop_reason",
    why="the verdict of each choice, and withholding one that a policy stopped",
)
reads(
    f"{OUTPUTS}:RequestState",
    "queue",
    "output_kind",
    "detokenizer",
    why="whose answer it is, and whether a part of it was sent before",
)
reads("vllm.v1.engine.parallel_sampling:ParentRequest", "n", why="choices of a request")
assumes(
    "every route builds its answers from the `RequestOutput`s of `OutputProcessor`, and registers "
    "its requests there in the context of the client request that it handles",
    why="answers are withheld, and verdicts told, in that one place",
)

INTERNAL = frozenset({FRESH, STOPPED_BY})
"""Keys of the verdicts' object that no client sees."""
BESIDE_TEXT = (
    "cumulative_logprob",
    "routed_experts",
    "sampling_mask",
    "weight_versions",
)
"""Fields of a `CompletionOutput` that repeat or describe its tokens."""


@patch(
    f"{OUTPUTS}:OutputProcessor.process_outputs",
    why="running totals reach `/metrics`, also if no client waits for the output any more",
    differs="takes `weight_version`, too, from 0.32; passed through",
)
def process_outputs(original: Original, _processor: Any, engine_core_outputs: Any) -> Any:
    """Remove changes of the running totals from a step's outputs, and add them to the metrics."""
    for output in engine_core_outputs:
        params = output.kv_transfer_params
        if params and KEY in params:
            show(params[KEY].pop(COUNTS, ()))
    return original()


@patch(f"{OUTPUTS}:OutputProcessor.add_request", why="which client request an answer belongs to")
def add_request(original: Original, _processor: Any, parent_req: Any, queue: Any) -> Any:
    """Count a request's choices among those of the client request that is being handled."""
    told = TOLD.get()
    if told is not None and queue is not None and TOLD_OF.get(queue) is None:
        TOLD_OF.set(queue, (told, told.enter(1 if parent_req is None else parent_req.n)))
    return original()


@patch(
    f"{OUTPUTS}:RequestState.make_request_output",
    why="the verdicts are taken out of `kv_transfer_params`, which the client may see",
    differs="takes `error`, too, from 0.32; passed through",
)
def make_request_output(original: Original, state: Any, kv_transfer_params: Any) -> Any:
    """Keep a request's verdicts for its choice, and pass vLLM the parameters without them."""
    if not kv_transfer_params or KEY not in kv_transfer_params:
        return original()
    found, earlier = kv_transfer_params[KEY], REQUEST_VERDICTS.get(state) or {}
    unsent = earlier.get(FRESH)  # vLLM may pass over an output of a stream
    REQUEST_VERDICTS.set(
        state, {**found, FRESH: [*unsent, *found.get(FRESH, ())]} if unsent else found
    )
    others = {key: value for key, value in kv_transfer_params.items() if key != KEY}
    return original(kv_transfer_params=others or None)


@patch(
    f"{OUTPUTS}:RequestState._new_completion_output",
    why="the verdict of each choice, and withholding one that a policy stopped",
)
def new_completion_output(original: Original, state: Any) -> Any:
    """Give a request's last `CompletionOutput` its verdicts; withhold it if a policy stopped it."""
    output = original()
    found = REQUEST_VERDICTS.get(state)
    if found is None:
        return output
    told_of = TOLD_OF.get(state.queue) if state.queue is not None else None
    fresh, reason = found.get(FRESH), found.get(STOPPED_BY)
    verdicts = {key: value for key, value in found.items() if key not in INTERNAL}
    if output.finish_reason is None:
        if fresh and told_of is not None:
            told_of[0].flag(told_of[1] + output.index, verdicts, fresh)
            REQUEST_VERDICTS.set(state, verdicts)
        return output
    if reason is not None:
        _stop(output, reason, verdicts, state)
    CHOICE_VERDICTS.set(output, verdicts)
    if told_of is not None:
        told, first = told_of
        told.tell(first + output.index, verdicts)
        if reason is not None:
            told.stops[first + output.index] = output.text
            told.reasons[first + output.index] = reason
    return output


def _stop(output: Any, reason: str, verdicts: Mapping[str, Any], state: Any) -> None:
    """End an answer that a policy stopped; put the policy's message, if any, in its place."""
    output.finish_reason, output.stop_reason = FINISH, reason
    message = verdicts.get(MESSAGE)
    if message is None:
        output.text = Stopped(output.text)
        return
    tokens = len(output.token_ids)
    sent = state.output_kind.name == "DELTA" and state.detokenizer.num_output_tokens() > tokens
    text = f"{SEPARATOR}{message}" if sent else message
    output.text = Stopped(text, is_message=True, tokens=tokens)
    _withhold(output)


def _withhold(output: Any) -> None:
    output.token_ids = []
    output.logprobs = None if output.logprobs is None else []
    for name in BESIDE_TEXT:
        if getattr(output, name, None) is not None:
            setattr(output, name, None)


@patch("vllm.outputs:RequestOutput.add", why="merging two outputs keeps the verdicts")
def add_output(original: Original, output: Any, next_output: Any) -> None:
    """Merge two outputs; the later one's verdicts, and its message, replace the earlier one."""
    later = {c.index: c for c in next_output.outputs if CHOICE_VERDICTS.get(c) is not None}
    unsent = {c.index: len(c.token_ids) for c in output.outputs} if later else {}
    original()
    for completion in output.outputs if later else ():
        last = later.get(completion.index)
        if last is None or completion is last:
            continue
        CHOICE_VERDICTS.set(completion, CHOICE_VERDICTS.get(last) or {})
        text = last.text
        if isinstance(text, Stopped) and text.is_message:
            text.tokens += unsent[completion.index]
            completion.text = text
            _withhold(completion)
        elif isinstance(text, Stopped):
            completion.text = Stopped(completion.text)
