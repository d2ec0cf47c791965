"""The model's side of the guard, the same for both runners: taps in, packets out."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import structlog
import torch

from saeguard.guard import clamp as clamping
from saeguard.guard.packet import Packet
from saeguard.guard.rows import lay_out
from saeguard.guard.tap import TAPS, Tap, fingerprint, install_taps
from saeguard.guard.watchlist import WatchList
from saeguard.vllm.config import KEY, Settings, load_watchlist
from saeguard.vllm.layers import ModelError, decoder_layers, hook_layer

log = structlog.get_logger("saeguard")

FAR = torch.iinfo(torch.int64).max
SPARE_SLOTS = 2
"""Clamp state for this many times the running requests: preempted ones keep theirs."""


@dataclass(slots=True)
class Pending:
    """A pass whose activations are on their way to the host."""

    request_ids: list[str]
    query_start: np.ndarray
    host: dict[str, Any]
    event: Any


@dataclass(slots=True)
class WorkerGuard:
    """One worker's taps and what it must remember between passes."""

    watchlist: WatchList
    taps: tuple[Tap, ...]
    excluded: torch.Tensor
    """[vocabulary] bool on the device."""
    device: torch.device
    announced: dict[str, tuple[int, Sequence[str]]] = field(default_factory=dict)
    """Prompt length and policies to enforce, of requests not yet in a slot."""
    slots: dict[str, int] = field(default_factory=dict)
    free: list[int] = field(default_factory=list)
    opened: tuple[list[str], np.ndarray, torch.Tensor] | None = None
    """The pass under way: request ids, first rows, positions."""
    pending: Pending | None = None
    tested: bool = False
    observation: Any = None

    def admit(self, request_id: str) -> int:
        """Give a request its slot in the clamp state, unless it has one."""
        slot = self.slots.get(request_id)
        if slot is not None:
            return slot
        prompt_tokens, enforce = self.announced.pop(request_id)
        if not self.free:
            raise RuntimeError(
                f"no clamp slot is free for {request_id}: {len(self.slots)} requests are in flight"
            )
        slot = self.slots[request_id] = self.free.pop()
        scopes = {"prompt": (0, prompt_tokens), "output": (prompt_tokens, FAR), "both": (0, FAR)}
        for tap in self.taps:
            if tap.clamp is not None:
                policies = [self.watchlist.policies[i] for i in tap.clamp.policies]
                clamping.admit(
                    tap.clamp,
                    slot,
                    # The self-test compares with what the next block consumes: no edits before.
                    [self.tested and (p.mode == "enforce" or p.id in enforce) for p in policies],
                    [scopes[p.scope] for p in policies],
                )
        return slot

    def release(self, request_ids: Iterable[str]) -> None:
        """Take back the slots of requests that ended."""
        for request_id in request_ids:
            self.announced.pop(request_id, None)
            slot = self.slots.pop(request_id, None)
            if slot is not None:
                self.free.append(slot)

    @property
    def clamps(self) -> bool:
        """Whether any policy can edit."""
        return any(tap.clamp is not None for tap in self.taps)

    def before(
        self,
        request_ids: list[str],
        query_start: np.ndarray,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
    ) -> None:
        """Write the layout of the pass that comes next.

        Args:
            request_ids: in row order.
            query_start: [requests + 1] first row of each.
            input_ids: [rows] token ids, on the device.
            positions: [rows] position of each token in its request, on the device.
        """
        rows = self.taps[0].rows
        torch.logical_not(self.excluded[input_ids], out=rows.watched[: len(input_ids)])
        if self.clamps:
            lay_out(rows, [self.admit(r) for r in request_ids], query_start, positions)
        self.opened = request_ids, query_start, positions
        for tap in self.taps:
            tap.ticks.zero_()

    def after(self) -> None:
        """Start copying what the pass saw; `collect` finishes it."""
        assert self.opened is not None
        (request_ids, query_start, positions), self.opened = self.opened, None
        n = int(query_start[-1])
        device = {
            "f": [tap.f[:n] for tap in self.taps],
            "acted": [tap.clamp.acted[:n] for tap in self.taps if tap.clamp is not None],
            "ticks": [tap.ticks for tap in self.taps],
            "watched": [self.taps[0].rows.watched[:n]],
            "positions": [positions],
        }
        if self.device.type == "cuda":
            host = {k: [_to_pinned(t) for t in ts] for k, ts in device.items()}
            event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        else:
            host = {k: [t.clone() for t in ts] for k, ts in device.items()}
            event = None
        self.pending = Pending(request_ids, query_start, host, event)

    def collect(self, pending: Pending) -> Packet:
        """Wait for the copies of one pass and return them."""
        if pending.event is not None:
            pending.event.synchronize()
        host = {k: [t.numpy() for t in ts] for k, ts in pending.host.items()}
        f = host["f"][0] if len(host["f"]) == 1 else np.concatenate(host["f"], axis=1)
        return Packet(
            request_ids=pending.request_ids,
            query_start=pending.query_start,
            positions=host["positions"][0],
            watched=host["watched"][0],
            f=f,
            acted=np.concatenate(host["acted"], axis=1) if host["acted"] else None,
            ran=all(int(t) == 1 for t in host["ticks"]),
            watchlist=self.watchlist.digest,
        )


def cost(guard: WorkerGuard, rows: int, repeats: int = 20) -> tuple[float, float]:
    """Measure what the watch list costs: MiB held, and microseconds of a pass of `rows` rows."""
    tensors: set[torch.Tensor] = {guard.excluded}
    for tap in guard.taps:
        for part in (tap, tap.rows, tap.clamp):
            values = [] if part is None else [getattr(part, f.name) for f in fields(part)]
            tensors |= {v for v in values if isinstance(v, torch.Tensor)}
    held = sum(t.untyped_storage().nbytes() for t in tensors) / 2**20
    guard.taps[0].rows.slot.zero_()  # the slot of nobody: nothing is clamped
    samples = []
    for _ in range(repeats):
        started = time.perf_counter()
        for tap in guard.taps:
            torch.ops.saeguard.tap(tap.W.new_zeros(rows, tap.W.shape[0]), None, tap.layer)
        if guard.device.type == "cuda":
            torch.cuda.synchronize(guard.device)
        samples.append(time.perf_counter() - started)
    return held, 1e6 * sorted(samples)[repeats // 2]


def _to_pinned(tensor: torch.Tensor) -> torch.Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    return host


def mark_graph(vllm_config: Any, watchlist: WatchList) -> None:
    """Enter what the guard traces into the model's graph into vLLM's compile hash."""
    layers = ",".join(str(hook.layer) for hook in watchlist.hooks)
    vllm_config.additional_config[KEY] = {
        **vllm_config.additional_config[KEY],
        "graph": f"tap {fingerprint()} resid_post {layers}",
    }


def attach(model: Any, vllm_config: Any, watchlist: WatchList, device: torch.device) -> WorkerGuard:
    """Check that the watch list fits the model, and put its taps into the layers.

    Raises:
        ModelError: width, depth or parallelism does not fit; both values are in the message.
    """
    config = vllm_config.model_config.hf_text_config
    hidden, depth = int(config.hidden_size), int(config.num_hidden_layers)
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise ModelError(
            "pipeline parallelism is not supported yet by this version of saeguard: the hooked "
            "layer's activations would stay on another rank"
        )
    _check_model(vllm_config.model_config.model, hidden, depth, watchlist)
    for hook in watchlist.hooks:
        if hook.d_in != hidden:
            raise ModelError(
                f"the SAE reads vectors of width {hook.d_in}, the model's residual stream is "
                f"{hidden} wide: this SAE belongs to another model"
            )
        if not 0 <= hook.layer < depth:
            raise ModelError(
                f"the SAE reads layer {hook.layer}, the model has layers 0 to {depth - 1}"
            )
    layers = decoder_layers(model, depth)
    scheduler = vllm_config.scheduler_config
    slots = SPARE_SLOTS * scheduler.max_num_seqs
    taps = install_taps(
        watchlist,
        max_tokens=max(scheduler.max_num_batched_tokens, scheduler.max_num_seqs) + 8,
        slots=slots,
        device=device,
    )
    for tap in taps:
        hook_layer(layers, tap.layer)
    excluded = torch.zeros(vllm_config.model_config.get_vocab_size() + 1, dtype=torch.bool)
    excluded[list(watchlist.exclude_tokens)] = True
    guard = WorkerGuard(
        watchlist=watchlist,
        taps=taps,
        excluded=excluded.to(device),
        device=device,
        free=list(range(1, slots + 1))[::-1],
    )
    log.info("saeguard taps installed", layers=sorted(TAPS), rows=watchlist.columns)
    return guard


def _check_model(path: str, hidden: int, depth: int, watchlist: WatchList) -> None:
    for model in watchlist.models:
        if (model.hidden_size, model.num_layers) != (hidden, depth):
            raise ModelError(
                f"the feature set was made for {model.name}: width {model.hidden_size}, "
                f"{model.num_layers} layers; the model served has width {hidden}, {depth} layers. "
                "Serve that model, or load feature sets made for this one"
            )
        weights = Path(path) / "model.safetensors"
        if model.sha256 is not None and weights.is_file():
            with weights.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != model.sha256:
                raise ModelError(
                    f"{weights}: sha256 is {found}, the feature set was made for {model.name} with "
                    f"sha256 {model.sha256}: latents mean nothing in other weights"
                )


def prepare(vllm_config: Any, settings: Settings) -> WatchList:
    """Read the watch list before the model is built, so that a mistake costs seconds.

    Raises:
        ModelError: the model does not generate.
    """
    watchlist = load_watchlist(settings)
    if vllm_config.model_config.runner_type == "pooling":
        raise ModelError(
            "pooling and embedding models are not supported: nothing is generated, so the start-up "
            "self-test cannot show that the guard sees the residual; remove `saeguard` from "
            "--additional-config to serve this model unguarded"
        )
    mark_graph(vllm_config, watchlist)
    return watchlist


def enforced_by_request(sampling_params: Any) -> tuple[str, ...]:
    """Return the shadow policies a request asks to have enforced; checked at admission."""
    extra = getattr(sampling_params, "extra_args", None) or {}
    wanted = extra.get("saeguard_enforce")
    return tuple(str(wanted).split(",")) if wanted else ()
