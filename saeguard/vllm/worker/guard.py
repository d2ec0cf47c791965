"""The model's side of the guard, the same for both runners: taps in, packets out."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import structlog
import torch

from saeguard.features.model_fit import ModelFitError, sae_misfit
from saeguard.guard.clamp import rules as clamping
from saeguard.guard.compiled_rules import is_sampled
from saeguard.guard.forward_pass import ForwardPass, Rows, allocate_rows, lay_out
from saeguard.guard.install_taps import add_clamps, install_taps, write_rows
from saeguard.guard.scopes import OUTPUT, TEMPLATE
from saeguard.guard.tap import TAPS, Tap, fingerprint
from saeguard.guard.watchlist import WatchList, clamps_digest
from saeguard.reload.worker_updates import Admitted, WorkerUpdate
from saeguard.vllm.model_fit import check_models
from saeguard.vllm.settings import KEY, Settings, start
from saeguard.vllm.worker.attach import ModelError, decoder_layers, hook_layer, is_here
from saeguard.vllm.worker.pipeline_parallel import Reading

log = structlog.get_logger("saeguard")

SPARE_SLOTS = 2
"""Clamp state for this many times the running requests: preempted ones keep theirs."""


@dataclass(slots=True)
class Pending:
    """A pass whose activations are on their way to the host."""

    request_ids: list[str]
    query_start: np.ndarray
    host: list[Reading]
    """By hook, in the watch list's order."""
    eligible: torch.Tensor
    positions: torch.Tensor
    event: Any
    swaps: int


@dataclass(slots=True)
class WorkerGuard:
    """One worker's taps and what it must remember between passes."""

    watchlist: WatchList
    taps: tuple[Tap, ...]
    """Of the layers that are on this pipeline stage."""
    rows: Rows
    excluded: torch.Tensor
    """[vocabulary] bool on the device."""
    device: torch.device
    last_stage: bool = True
    """Whether the sampled tokens, and so the packets, come from here."""
    announced: dict[str, tuple[int, Admitted | None]] = field(default_factory=dict)
    """Prompt length and what may edit it, of requests not yet in a slot."""
    clamp_lists: dict[str, WatchList] = field(default_factory=dict)
    """By digest of the clamps in the taps: the list that they were made of."""
    swaps: int = 0
    """Number of the last swap of the watch list that was carried out."""
    slots: dict[str, int] = field(default_factory=dict)
    free: list[int] = field(default_factory=list)
    prompts: dict[str, np.ndarray] = field(default_factory=dict)
    """Of requests in a slot: [prompt tokens] indices into `ROLES`."""
    computed: dict[str, int] = field(default_factory=dict)
    """Of the requests of the pass that comes: tokens computed before it, drafts included."""
    opened: tuple[list[str], np.ndarray, torch.Tensor] | None = None
    """The pass under way: request ids, first rows, positions."""
    received: dict[int, Reading] = field(default_factory=dict)
    """What earlier pipeline stages read in the pass under way, by layer."""
    outgoing: dict[int, Reading] | None = None
    """What the next stage must be told of a pass."""
    pending: Pending | None = None
    tested: bool = False
    failures: list[str] = field(default_factory=list)
    """What the self-test found wrong on this rank."""
    observation: Any = None

    def admit(self, request_id: str) -> int:
        """Give a request its slot in the clamp state, unless it has one."""
        slot = self.slots.get(request_id)
        if slot is not None:
            return slot
        prompt_tokens, admitted = self.announced.pop(request_id)
        if admitted is None and self.tested:
            raise RuntimeError(f"saeguard: nobody has said what may edit {request_id}")
        if not self.free:
            raise RuntimeError(
                f"no clamp slot is free for {request_id}: {len(self.slots)} requests are in flight"
            )
        slot = self.slots[request_id] = self.free.pop()
        roles = None if admitted is None else admitted.roles
        self.prompts[request_id] = (
            np.full(prompt_tokens, TEMPLATE, np.uint8) if roles is None else roles
        )
        for tap in self.taps:
            for digest, clamp in tap.clamps.items():
                policies = [self.clamp_lists[digest].policies[i] for i in clamp.policies]
                # The self-test compares with what the next block consumes: no edits before.
                mine = admitted if self.tested and admitted and admitted.clamps == digest else None
                clamping.admit(
                    clamp,
                    slot,
                    [
                        mine is not None
                        and (p.id, p.mode) in mine.enforced
                        and is_sampled(p, request_id)
                        for p in policies
                    ],
                )
        return slot

    def carry_out(self, update: WorkerUpdate) -> None:
        """Do what the engine core tells before a pass.

        Raises:
            RuntimeError: an order before this one was lost, or clamps are missing.
        """
        if update.after != self.swaps:
            raise RuntimeError(
                f"saeguard: the taps carried out swap {self.swaps} of the watch list, the engine "
                f"core believes {update.after}: this rank reads other rows than the rules judge"
            )
        for digest in update.dropped:
            self.clamp_lists.pop(digest, None)
            for tap in self.taps:
                tap.clamps.pop(digest, None)
        if update.swap is not None:
            for write in update.swap.writes:
                write_rows(self.taps, write)
            for digest, watchlist in update.swap.clamps.items():
                self.clamp_lists[digest] = watchlist
                add_clamps(self.taps, digest, watchlist, slots=len(self.free) + len(self.slots))
            self.swaps = update.swap.number
        needed = {admitted.clamps for admitted in update.admitted.values()}
        if missing := needed - self.clamp_lists.keys() - {""}:
            raise RuntimeError(
                f"saeguard: requests may be edited by clamps {sorted(missing)}, which this rank "
                "does not have: they would not be edited, and nothing would say so"
            )

    def release(self, request_ids: Iterable[str]) -> None:
        """Take back the slots of requests that ended."""
        for request_id in request_ids:
            self.announced.pop(request_id, None)
            self.prompts.pop(request_id, None)
            slot = self.slots.pop(request_id, None)
            if slot is not None:
                self.free.append(slot)

    @property
    def clamps(self) -> bool:
        """Whether any policy can edit."""
        return any(tap.clamps for tap in self.taps)

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
        torch.logical_not(self.excluded[input_ids], out=self.rows.eligible[: len(input_ids)])
        if self.clamps:
            slots = [self.admit(r) for r in request_ids]
            lay_out(
                self.rows, slots, query_start, positions, self._places(request_ids, query_start)
            )
        self.opened = request_ids, query_start, positions
        for tap in self.taps:
            tap.ticks.zero_()

    def _places(self, request_ids: list[str], query_start: np.ndarray) -> np.ndarray:
        """Return [rows] indices into `ROLES`; of a prompt the engine knows how far it is."""
        role = np.full(int(query_start[-1]), OUTPUT)
        for i, request_id in enumerate(request_ids):
            prompt, first = self.prompts[request_id], self.computed[request_id]
            if first < len(prompt):
                here = prompt[first : first + int(query_start[i + 1] - query_start[i])]
                role[query_start[i] : query_start[i] + len(here)] = here
        return role

    def after(self) -> None:
        """Start copying what the pass saw; `collect` finishes it. Other stages pass it on."""
        assert self.opened is not None
        (request_ids, query_start, positions), self.opened = self.opened, None
        n = int(query_start[-1])
        readings, self.received = self.received, {}
        for tap in self.taps:
            acted = {digest: clamp.acted[:n] for digest, clamp in tap.clamps.items()}
            readings[tap.layer] = Reading(tap.f[:n], tap.ticks.reshape(1), acted)
        if not self.last_stage:
            self.outgoing = {layer: reading.copy() for layer, reading in readings.items()}
            return
        host = [
            Reading(
                self._to_host(f),
                self._to_host(ticks),
                {digest: self._to_host(where) for digest, where in acted.items()},
            )
            for f, ticks, acted in (readings[hook.layer] for hook in self.watchlist.hooks)
        ]
        eligible, positions = self._to_host(self.rows.eligible[:n]), self._to_host(positions)
        event: Any = None
        if self.device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self.pending = Pending(
            request_ids, query_start, host, eligible, positions, event, self.swaps
        )

    def collect(self, pending: Pending) -> ForwardPass:
        """Wait for the copies of one pass and return them."""
        if pending.event is not None:
            pending.event.synchronize()
        f = [reading.f.numpy() for reading in pending.host]
        acted: dict[str, list[np.ndarray]] = {}
        for reading in pending.host:
            for digest, where in reading.acted.items():
                acted.setdefault(digest, []).append(where.numpy())
        return ForwardPass(
            request_ids=pending.request_ids,
            query_start=pending.query_start,
            positions=pending.positions.numpy(),
            eligible=pending.eligible.numpy(),
            f=f[0] if len(f) == 1 else np.concatenate(f, axis=1),
            acted=None,
            ran=all(int(reading.ticks) == 1 for reading in pending.host),
            watchlist=self.watchlist.digest,
            swaps=pending.swaps,
            acted_by={digest: np.concatenate(a, axis=1) for digest, a in acted.items()},
        )

    def _to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """Start a copy that outlives the next pass."""
        if self.device.type != "cuda":
            return tensor.clone()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)


def cost(guard: WorkerGuard, rows: int, repeats: int = 20) -> tuple[float, float]:
    """Measure what the watch list costs: MiB held, and microseconds of a pass of `rows` rows."""
    tensors: set[torch.Tensor] = {guard.excluded}
    for tap in guard.taps:
        clamps = tap.clamps.values()
        parts: list[Any] = [tap, tap.rows, *clamps, *(clamp.edits for clamp in clamps)]
        parts += [ranked.buffers for ranked in tap.ranked if ranked.buffers is not None]
        for part in parts:
            values = [getattr(part, f.name) for f in fields(part)]
            tensors |= {v for v in values if isinstance(v, torch.Tensor)}
        tensors |= {t for r in tap.ranked for t in (r.competitors.rows.W, r.competitors.rows.b)}
    held = sum(t.untyped_storage().nbytes() for t in tensors) / 2**20
    guard.rows.clamp_slot.zero_()  # the slot of nobody: nothing is clamped
    samples = []
    for _ in range(repeats):
        started = time.perf_counter()
        for tap in guard.taps:
            torch.ops.saeguard.tap(tap.W.new_zeros(rows, tap.W.shape[0]), None, tap.layer)
        if guard.device.type == "cuda":
            torch.cuda.synchronize(guard.device)
        samples.append(time.perf_counter() - started)
    return held, 1e6 * sorted(samples)[repeats // 2]


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
        ModelFitError: width or depth does not fit; both values are in the message.
    """
    from vllm.distributed.parallel_state import get_pp_group

    shape = check_models(vllm_config.model_config, watchlist.models)
    for hook in watchlist.hooks:
        wrong = sae_misfit(hook.d_in, hook.layer, shape)
        if wrong:
            raise ModelFitError(wrong)
    layers = decoder_layers(model, shape.num_layers)
    scheduler = vllm_config.scheduler_config
    slots = SPARE_SLOTS * scheduler.max_num_seqs
    max_tokens = max(scheduler.max_num_batched_tokens, scheduler.max_num_seqs) + 8
    here = tuple(hook for hook in watchlist.hooks if is_here(layers[hook.layer]))
    taps = install_taps(
        replace(watchlist, hooks=here), max_tokens=max_tokens, slots=slots, device=device
    )
    for tap in taps:
        hook_layer(layers, tap.layer)
    excluded = torch.zeros(vllm_config.model_config.get_vocab_size() + 1, dtype=torch.bool)
    excluded[list(watchlist.exclude_tokens)] = True
    guard = WorkerGuard(
        watchlist=watchlist,
        taps=taps,
        rows=taps[0].rows if taps else allocate_rows(max_tokens, device),
        excluded=excluded.to(device),
        device=device,
        last_stage=get_pp_group().is_last_rank,
        free=list(range(1, slots + 1))[::-1],
        clamp_lists={clamps_digest(watchlist): watchlist},
    )
    log.info("saeguard taps installed", layers=sorted(TAPS), rows=watchlist.columns)
    for name, found in sorted(watchlist.approximations.items()):
        log.warning(
            "saeguard reads TopK latents by thresholds, not by rank",
            feature_set=name,
            how=found.told,
        )
    for tap in taps:
        for ranked in tap.ranked:
            log.info(
                "saeguard ranks latents exactly, so it holds the encoder of all that compete",
                layer=tap.layer,
                latents=len(ranked.competitors.rows.b),
                mib=round(ranked.competitors.nbytes() / 2**20, 1),
            )
    return guard


def prepare(vllm_config: Any, settings: Settings) -> WatchList:
    """Read the watch list before the model is built, so that a mistake costs seconds.

    Raises:
        ModelError: the model does not generate.
    """
    watchlist = start(settings).watchlist
    parallel = vllm_config.parallel_config
    if parallel.world_size > 1 and parallel.distributed_executor_backend == "external_launcher":
        raise ModelError(
            "the external_launcher executor is not supported on several ranks: each of them would "
            "judge every request and write its events; let vLLM start the ranks (mp or ray)"
        )
    if vllm_config.model_config.runner_type == "pooling":
        raise ModelError(
            "pooling and embedding models are not supported: nothing is generated, so the start-up "
            "self-test cannot show that the guard sees the residual; remove `saeguard` from "
            "--additional-config to serve this model unguarded"
        )
    mark_graph(vllm_config, watchlist)
    return watchlist
