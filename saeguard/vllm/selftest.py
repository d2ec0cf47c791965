"""Start-up self-test: a real request goes through the engine before any other is let in.

A stale compile cache, a model family that returns something else, a hook that tracing dropped, a
seam that vLLM moved: all look alike from outside, a guard that is always quiet. So one short
prompt is served twice. The first time it bypasses the compiled graph, to see what the *next* block
consumes, which the first module inside it tells: a normalisation that adds two halves returns
their sum beside its own result; any other, or an attention where norms come after, is given the
stream as its one input. That also settles whether the second of two values that a block returns is
a half or a left-over. The second time the prompt takes the path that all traffic takes: its
activations must be those of that stream, and every token accounted for.
"""

from __future__ import annotations

import time
from typing import Any

import structlog
import torch
from torch import nn

from saeguard.errors import CannotRunError
from saeguard.guard.install_taps import set_floors
from saeguard.guard.tap import Tap, as_rows, pre_activations
from saeguard.sae.encoder import column_scales
from saeguard.vllm.worker.attach import decoder_layers, is_here

log = structlog.get_logger("saeguard")

PREFIX = "saeguard-self-test-"
"""Request ids of the test; honoured only until the test has passed."""
EAGER, SERVED = f"{PREFIX}eager", f"{PREFIX}served"
TOKENS = 16
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}
"""Largest difference between two readings, as a share of the largest pre-activation."""
STALE = (
    "the graph was built without the guard, perhaps taken from a stale compile cache: remove "
    "vLLM's cache directory (VLLM_CACHE_ROOT) and start again."
)
STEPS = 64
"""Engine steps within which a request of 18 tokens must have been served."""


class SelfTestError(CannotRunError):
    """The guard does not see what it must see; serving would be unguarded."""


# --- in the engine core -------------------------------------------------------------------------


def run(core: Any) -> None:
    """Serve the two requests on an `EngineCore` that has just been built.

    Raises:
        SelfTestError: a rank's taps do not see what they must, nothing came out, or tokens are not
            accounted for.
    """
    from saeguard.vllm.worker.hooks import tested

    guard = core.scheduler.saeguard
    for request_id in (EAGER, SERVED):
        request, wave = core.preprocess_add_request(_request(core, request_id))
        core.add_request(request, wave)
        for _ in range(STEPS):
            _, executed = core.step_fn()
            core.post_step(model_executed=executed)
            if request_id in guard.self_test:
                break
    wrong = core.model_executor.collective_rpc(tested)
    if any(wrong):
        raise SelfTestError(
            "\n".join(f"rank {rank}: {what}" for rank, what in enumerate(wrong) if what)
        )
    for request_id in (EAGER, SERVED):
        coverage = guard.self_test.get(request_id)
        # One prompt, one sampled token fed back, one that nothing reads unless a draft foresaw it.
        told = None if coverage is None else {**coverage.skipped, "evaluated": coverage.evaluated}
        if (
            told is None
            or sum(told.get(what, 0) for what in ("evaluated", "special_token", "not_forwarded"))
            != TOKENS + 2
        ):
            raise SelfTestError(
                f"saeguard self-test: of {TOKENS + 2} tokens served, the guard accounts for "
                f"{coverage}; expected {TOKENS + 1} evaluated and 1 not forwarded"
                + (
                    f". A tap did not run in every pass: {STALE}"
                    if told and "error" in told
                    else ""
                )
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
        cache_salt=PREFIX,
        data_parallel_rank=None,
    )


# --- in the worker ------------------------------------------------------------------------------


class Observation:
    """What the worker's model shows in the eager pass, to compare the served pass with."""

    def __init__(self) -> None:
        """Nothing has been seen yet."""
        self.residual: dict[int, torch.Tensor] = {}
        """By layer: the stream that the next block consumes, [tokens, d]."""
        self.returned: dict[int, tuple[torch.Tensor, ...]] = {}
        """By layer: the values that the block returned."""
        self.sent: dict[int, tuple[torch.Tensor, ...]] = {}
        """By layer that ends a pipeline stage: the values that the next stage is sent."""
        self._hooks: list[Any] = []

    def watch(self, model: Any, depth: int, taps: tuple[Tap, ...]) -> None:
        """Let the next pass bypass compiled graphs, and record what its blocks consume."""
        if not self.residual:
            _show_unranked(taps, shown=True)
            self._hooks = [
                model.register_forward_pre_hook(_bypass_graphs),
                *_observe(model, decoder_layers(model, depth), taps, self),
            ]

    def stop(self) -> None:
        """Remove what `watch` put in."""
        while self._hooks:
            self._hooks.pop().remove()

    def settle(self, taps: tuple[Tap, ...]) -> None:
        """Tell each tap whether to add the second value that its block returns.

        Where a pipeline stage ends, the block before the last shows what its values are.

        Raises:
            SelfTestError: a tap did not run.
        """
        for tap in taps:
            _ran_once(tap)
            sent = self.sent.get(tap.layer)
            halves = self._halves(tap.layer if sent is None else tap.layer - 1)
            if halves is not None:
                tap.halves.fill_(halves)
            if sent is not None and len(sent) == 1:
                self.residual[tap.layer] = sent[0]
            elif sent is not None and len(sent) == 2 and halves is not None:  # noqa: PLR2004
                self.residual[tap.layer] = sent[0] + halves * sent[1]

    def _halves(self, layer: int) -> float | None:
        """Return 1 where a block's second value is a half, 0 for a left-over, None if unknown."""
        x, returned = self.residual.get(layer), self.returned.get(layer, ())
        if x is None or len(returned) < 2:  # noqa: PLR2004
            return None
        hidden, other = returned
        return float((x - hidden).abs().max() >= (x - hidden - other).abs().max())

    def compare(self, taps: tuple[Tap, ...], rows: int, dtype: torch.dtype) -> None:
        """Compare the taps' activations of a prompt pass with the observed residual.

        Raises:
            SelfTestError: says which layer, what was expected and what was seen.
        """
        _show_unranked(taps, shown=False)
        allowed = TOLERANCE.get(dtype, max(TOLERANCE.values()))
        for tap in taps:
            x = self.residual.get(tap.layer)
            _ran_once(tap)
            if x is None:
                raise SelfTestError(
                    f"saeguard self-test: nothing could be observed behind layer {tap.layer}; "
                    "this model family is not supported"
                )
            if x.dim() != 2 or x.shape[1] != tap.W.shape[0]:  # noqa: PLR2004
                raise SelfTestError(
                    f"saeguard self-test: behind layer {tap.layer} goes a tensor of shape "
                    f"{list(x.shape)}, expected [tokens, {tap.W.shape[0]}]: not one residual "
                    "stream. This model family is not supported."
                )
            x = x[:rows].to(tap.W.device)
            pre = pre_activations(tap, x, column_scales(tap.norm, x))
            scale = pre.abs().max().clamp(min=1e-6)
            # Within rounding of its threshold a latent may show on one side only.
            sure = (pre - tap.theta).abs() / scale > allowed
            gap = ((tap.f[:rows] - pre * (pre > tap.theta)).abs() / scale)[sure]
            difference = float(gap.max()) if gap.numel() else 0.0
            if not difference <= allowed:
                raise SelfTestError(
                    f"saeguard self-test: at layer {tap.layer} the tap does not read the residual "
                    f"stream: activations differ by {difference:.3g} of their magnitude, allowed "
                    f"{allowed:.3g}. This model family is not supported."
                )
            log.info("saeguard self-test", layer=tap.layer, difference=difference, allowed=allowed)


def _show_unranked(taps: tuple[Tap, ...], *, shown: bool) -> None:
    """Let activations show that would be silent for their rank: most, at any one token."""
    for tap in taps:
        for ranked in tap.ranked:
            ranked.show_all.fill_(shown)
        set_floors(tap)


def _ran_once(tap: Tap) -> None:
    if int(tap.ticks) != 1:
        raise SelfTestError(
            f"saeguard self-test: the tap at layer {tap.layer} ran {int(tap.ticks)} times in one "
            f"pass: {STALE}"
        )


def _bypass_graphs(_module: nn.Module, _args: Any) -> None:
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import get_forward_context

    context = get_forward_context()
    context.skip_compiled = True
    context.cudagraph_runtime_mode = CUDAGraphMode.NONE


def _observe(
    model: nn.Module, layers: nn.ModuleList, taps: tuple[Tap, ...], seen: Observation
) -> list[Any]:
    """Hook each tapped layer and what lies behind it: what one returns, the other consumes."""
    handles: list[Any] = []
    for tap in taps:
        layer, last = tap.layer, tap.layer + 1 == len(layers)
        if not last and not is_here(layers[layer + 1]):
            handles.append(model.register_forward_hook(_keep_sent(layer, seen)))
            layer -= 1  # shows what this layer's values are
            if layer < 0 or not is_here(layers[layer]):
                continue
        consumer = model if last else layers[layer + 1]
        handles += _observe_layer(layers[layer], consumer, layer, seen)
    return handles


def _keep_sent(layer: int, seen: Observation) -> Any:
    def leave(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.sent[layer] = tuple(_copy(v) for v in output.tensors.values() if _is_residual(v))

    return leave


def _observe_layer(
    tapped: nn.Module, consumer: nn.Module, layer: int, seen: Observation
) -> list[Any]:
    first: list[nn.Module | None] = []

    def arm(_module: nn.Module, _args: Any, output: Any) -> None:
        if layer not in seen.residual:
            first[:] = [None]
            values = output[:2] if isinstance(output, tuple) else (output,)
            seen.returned[layer] = tuple(_copy(v) for v in values if _is_residual(v))

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        given = [t for t in (*args, *kwargs.values()) if _is_residual(t)]
        if first == [None] and given:
            first[:] = [module]
            if len(given) == 1:  # of two, nothing but the module knows what becomes
                seen.residual[layer] = _copy(given[0])

    def leave(module: nn.Module, _args: Any, output: Any) -> None:
        if first and first[0] is module:
            first.clear()
            if isinstance(output, tuple) and len(output) > 1 and _is_residual(output[1]):
                seen.residual[layer] = _copy(output[1])

    inside = [module for module in consumer.modules() if module is not consumer]
    return [
        tapped.register_forward_hook(arm),
        *(module.register_forward_pre_hook(enter, with_kwargs=True) for module in inside),
        *(module.register_forward_hook(leave) for module in inside),
    ]


def _copy(x: torch.Tensor) -> torch.Tensor:
    return as_rows(x.detach().float().clone())


def _is_residual(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 1
