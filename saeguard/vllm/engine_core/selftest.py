"""The engine core's half of the start-up self-test: serve two requests before any other.

The workers compare what the taps read with the residual stream; see
`saeguard.vllm.worker.selftest`. The engine core asks every rank for its result, and checks that the
coverage contains every token of both requests.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from saeguard.guard.verdict import Coverage
from saeguard.vllm.messages import EAGER, SELF_TEST, SERVED, STALE_GRAPH, SelfTestError
from saeguard.vllm.patches import assumes, calls, reads
from saeguard.vllm.rank_report import self_test_failure

if TYPE_CHECKING:
    from saeguard.vllm.engine_core.guard import EngineGuard

TOKENS = 16
"""Length of the self-test's prompt."""
STEPS = 64
"""Engine steps within which a request of 18 tokens must have been served."""

CORE = "vllm.v1.engine.core:EngineCore"

reads(CORE, "vllm_config", "step_fn", "model_executor", why="serving the self-test's requests")
calls(f"{CORE}.preprocess_add_request", "request", why="serving the self-test's requests")
calls(f"{CORE}.add_request", "request", "request_wave", why="serving the self-test's requests")
calls(f"{CORE}.post_step", named=("model_executed",), why="serving the self-test's requests")
calls(
    "vllm.v1.executor:Executor.collective_rpc",
    "method",
    why="asking every rank how the self-test went; vLLM reports the errors of one rank only",
)
assumes("`collective_rpc` answers in the order of ranks", why="naming the rank that failed")
calls(
    "vllm.v1.engine:EngineCoreRequest",
    named=(
        "request_id",
        "prompt_token_ids",
        "mm_features",
        "sampling_params",
        "pooling_params",
        "arrival_time",
        "lora_request",
        "cache_salt",
        "data_parallel_rank",
    ),
    why="the self-test's requests",
    differs="further fields have defaults",
)
reads("vllm.config:ModelConfig", "get_vocab_size", why="the self-test's prompt")


def run(core: Any, guard: EngineGuard) -> None:
    """Serve the two requests on an `EngineCore` that has just been built.

    Raises:
        SelfTestError: a rank's taps do not read the residual stream, or tokens are unaccounted for.
    """
    for request_id in (EAGER, SERVED):
        request, wave = core.preprocess_add_request(_request(core, request_id))
        core.add_request(request, wave)
        for _ in range(STEPS):
            _, executed = core.step_fn()
            core.post_step(model_executed=executed)
            if request_id in guard.self_test:
                break
    failures = core.model_executor.collective_rpc(self_test_failure)
    if any(failures):
        raise SelfTestError(
            "\n".join(f"rank {rank}: {why}" for rank, why in enumerate(failures) if why)
        )
    for request_id in (EAGER, SERVED):
        _check_coverage(guard.self_test.get(request_id))


def _check_coverage(coverage: Coverage | None) -> None:
    """Check that a request's tokens were evaluated, or skipped for one of the allowed reasons.

    The tokens are the prompt, one sampled token that is fed back, and a last one, which the model
    does not read unless a draft predicted it.

    Raises:
        SelfTestError: they were not, or a bound on the norm leaves out all of them.
    """
    total = TOKENS + 2
    counts: dict[str, int] = {}
    if coverage is not None:
        counts.update(coverage.skipped.items(), evaluated=coverage.evaluated)
    allowed = ("evaluated", "special_token", "massive_norm", "not_forwarded")
    if sum(counts.get(reason, 0) for reason in allowed) != total:
        raise SelfTestError(
            f"saeguard self-test: expected {total - 1} tokens evaluated and 1 not forwarded of "
            f"{total} served, found {coverage}"
            + (f". A tap did not run in every pass: {STALE_GRAPH}" if "error" in counts else "")
        )
    if counts.get("massive_norm") and not counts["evaluated"]:
        raise SelfTestError(
            "saeguard self-test: the norm of every token lies above the feature sets' max_norm, "
            "so no request would be evaluated: the bounds were measured on another model, or are "
            "wrong; run `saeguard features calibrate` again"
        )


def _request(core: Any, request_id: str) -> Any:
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    vocabulary = core.vllm_config.model_config.get_vocab_size()
    return EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=[(7 + 131 * i) % vocabulary for i in range(TOKENS)],
        mm_features=None,
        sampling_params=SamplingParams(
            max_tokens=2, temperature=0.0, ignore_eos=True, skip_reading_prefix_cache=True
        ),
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt=SELF_TEST,
        data_parallel_rank=None,
    )
