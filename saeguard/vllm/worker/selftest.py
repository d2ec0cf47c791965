"""The worker's half of the start-up self-test: check that each tap reads the residual stream.

A stale compile cache, an unsupported model family, a hook that tracing dropped, an internal that
vLLM moved: each of these makes a guard that never matches, and none raises an error. So the engine
core serves one short prompt twice before any request.

The first time, the prompt bypasses the compiled graph, and hooks record what the next layer
consumes. The first module inside that layer shows it. A normalisation that adds two halves returns
their sum beside its own result. Any other module, or an attention in models that normalise
afterwards, receives the residual stream as its one input. This also settles how to read a layer
that returns two values: the second is either half of the residual stream, to be added, or a
left-over, to be ignored.

The second time, the prompt takes the path of all traffic. The taps' activations must then be those
of the recorded residual stream.
"""

from __future__ import annotations

from typing import Any

import structlog
import torch
from torch import nn

from saeguard.guard.install_taps import set_floors
from saeguard.guard.tap import Tap, as_rows, pre_activations
from saeguard.sae.encoder import column_scales
from saeguard.vllm.messages import STALE_GRAPH, SelfTestError
from saeguard.vllm.patches import assumes, calls, reads
from saeguard.vllm.worker.layers import decoder_layers, is_here

log = structlog.get_logger("saeguard")

TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}
"""Largest difference allowed, as a share of the largest pre-activation, by the model's dtype."""

calls(
    "vllm.forward_context:get_forward_context",
    why="the self-test's first prompt bypasses compiled and captured graphs",
)
reads(
    "vllm.forward_context:ForwardContext",
    "skip_compiled",
    "cudagraph_runtime_mode",
    why="the self-test's first prompt bypasses compiled and captured graphs",
)
reads("vllm.config:CUDAGraphMode.NONE", why="the self-test's first prompt bypasses captured graphs")
assumes(
    "a layer returns one tensor; or `(hidden, residual, ...)`, not yet added; or the residual "
    "stream and a left-over; each `[tokens, d]`, or `[1, tokens, d]` from Transformers' own layers",
    why="reading the residual stream; the self-test finds out which it is, and measures it against "
    "what the next layer consumes",
)


class Observation:
    """What the layers consume in the self-test's uncompiled pass; the served pass must agree."""

    def __init__(self) -> None:
        """Start with nothing recorded."""
        self.residual: dict[int, torch.Tensor] = {}
        """By layer: the residual stream that the next layer consumes, [tokens, d]."""
        self.returned: dict[int, tuple[torch.Tensor, ...]] = {}
        """By layer: the values that the layer returned."""
        self.sent: dict[int, tuple[torch.Tensor, ...]] = {}
        """By last layer of a pipeline stage: the values that are sent to the next stage."""
        self._hooks: list[Any] = []

    def start(self, model: Any, depth: int, taps: tuple[Tap, ...]) -> None:
        """Make the next pass bypass compiled graphs, and record what its layers consume."""
        if not self.residual:
            _show_unranked(taps, shown=True)
            self._hooks = [
                model.register_forward_pre_hook(_bypass_graphs),
                *observe_layers(model, decoder_layers(model, depth), taps, self),
            ]

    def stop(self) -> None:
        """Remove the hooks that `start` registered."""
        while self._hooks:
            self._hooks.pop().remove()

    def choose_halves(self, taps: tuple[Tap, ...]) -> None:
        """Set for each tap whether to add the second value that its layer returns.

        The last layer of a pipeline stage has no next layer on this rank; the layer before it
        decides.

        Raises:
            SelfTestError: a tap did not run.
        """
        for tap in taps:
            _check_ran_once(tap)
            sent = self.sent.get(tap.layer)
            halves = self._halves(tap.layer if sent is None else tap.layer - 1)
            if halves is not None:
                tap.halves.fill_(halves)
            if sent is not None and len(sent) == 1:
                self.residual[tap.layer] = sent[0]
            elif sent is not None and len(sent) == 2 and halves is not None:  # noqa: PLR2004
                self.residual[tap.layer] = sent[0] + halves * sent[1]

    def _halves(self, layer: int) -> float | None:
        """Return 1 if a layer's second value is a half, 0 if it is a left-over, None if unknown."""
        x, returned = self.residual.get(layer), self.returned.get(layer, ())
        if x is None or len(returned) < 2:  # noqa: PLR2004
            return None
        hidden, other = returned
        return float((x - hidden).abs().max() >= (x - hidden - other).abs().max())

    def compare(self, taps: tuple[Tap, ...], rows: int, dtype: torch.dtype) -> None:
        """Compare the taps' activations of a prompt pass with the recorded residual stream.

        Raises:
            SelfTestError: names the layer, what was expected and what was found.
        """
        _show_unranked(taps, shown=False)
        allowed = TOLERANCE.get(dtype, max(TOLERANCE.values()))
        for tap in taps:
            x = self.residual.get(tap.layer)
            _check_ran_once(tap)
            if x is None:
                raise SelfTestError(
                    f"saeguard self-test: nothing could be observed behind layer {tap.layer}; "
                    "this model family is not supported"
                )
            if x.dim() != 2 or x.shape[1] != tap.W.shape[0]:  # noqa: PLR2004
                raise SelfTestError(
                    f"saeguard self-test: found a tensor of shape {list(x.shape)} behind layer "
                    f"{tap.layer}, expected [tokens, {tap.W.shape[0]}], one residual stream. This "
                    "model family is not supported."
                )
            x = x[:rows].to(tap.W.device)
            pre = pre_activations(tap, x, column_scales(tap.norm, x))
            scale = pre.abs().max().clamp(min=1e-6)
            # Within rounding of its threshold a latent may fire on one side only.
            sure = (pre - tap.theta).abs() / scale > allowed
            gap = ((tap.f[:rows, :-1] - pre * (pre > tap.theta)).abs() / scale)[sure]
            norm = x.norm(dim=1)
            off = (tap.f[:rows, -1] - norm).abs() / norm.clamp(min=1e-6)
            difference = float(torch.cat([gap, off]).max())
            if not difference <= allowed:
                raise SelfTestError(
                    f"saeguard self-test: at layer {tap.layer} the tap does not read the residual "
                    f"stream: activations or norms differ by {difference:.3g} of their size, "
                    f"allowed {allowed:.3g}. This model family is not supported."
                )
            log.info("saeguard self-test", layer=tap.layer, difference=difference, allowed=allowed)


def _show_unranked(taps: tuple[Tap, ...], *, shown: bool) -> None:
    """Make the taps report latents by threshold alone, or by rank again.

    On any one token, rank keeps most latents of a TopK SAE from firing. Without ranks, the
    comparison covers all of them.
    """
    for tap in taps:
        for ranked in tap.ranked:
            ranked.show_all.fill_(shown)
        set_floors(tap)


def _check_ran_once(tap: Tap) -> None:
    if int(tap.ticks) != 1:
        raise SelfTestError(
            f"saeguard self-test: the tap at layer {tap.layer} ran {int(tap.ticks)} times in one "
            f"pass: {STALE_GRAPH}"
        )


def _bypass_graphs(_module: nn.Module, _args: Any) -> None:
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import get_forward_context

    context = get_forward_context()
    context.skip_compiled = True
    context.cudagraph_runtime_mode = CUDAGraphMode.NONE


def observe_layers(
    model: nn.Module, layers: nn.ModuleList, taps: tuple[Tap, ...], seen: Observation
) -> list[Any]:
    """Hook each tapped layer and its consumer: the next layer, or the model after the last one."""
    handles: list[Any] = []
    for tap in taps:
        layer, last = tap.layer, tap.layer + 1 == len(layers)
        if not last and not is_here(layers[layer + 1]):
            handles.append(model.register_forward_hook(_keep_sent(layer, seen)))
            layer -= 1  # shows how to read the two values of this layer
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
    """Record what a layer returns, and the residual stream that the first module after it reads."""
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
            if len(given) == 1:  # of two inputs, only the module's output shows the sum
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
