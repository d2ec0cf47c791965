"""One worker's guard: it lays out each forward pass for the taps, and copies what they read.

Both model runners use it. They call `begin_pass` before the model runs. After it, `end_pass` starts
to copy the activations to the host, and `collect` waits for the copy. On a CPU, `end_pass` copies
them by numpy, since a call of torch takes several times as long.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from saeguard.guard.clamp import state as clamping
from saeguard.guard.compiled_rules import is_sampled
from saeguard.guard.forward_pass import ForwardPass, Rows, lay_out
from saeguard.guard.host_arrays import array_of
from saeguard.guard.install_taps import add_clamps, write_rows
from saeguard.guard.packed import Buffers, Packed
from saeguard.guard.scopes import OUTPUT, TEMPLATE
from saeguard.guard.tap import Tap
from saeguard.guard.watchlist import WatchList
from saeguard.reload.worker_updates import Admitted, WorkerUpdate
from saeguard.vllm.worker.pipeline_parallel import Reading
from saeguard.vllm.worker.prompt_rows import fill_prompt_rows

if TYPE_CHECKING:
    from saeguard.vllm.worker.selftest import Observation


def _rows_on_host(tensor: torch.Tensor, rows: slice | None) -> np.ndarray:
    """Return rows of a tensor in the host's memory, as an array that shares it."""
    array: np.ndarray = array_of(tensor)[rows]
    return array


class Layout(NamedTuple):
    """Which rows of a forward pass belong to which request."""

    request_ids: list[str]
    """In row order."""
    query_start: np.ndarray
    """[requests + 1] first row of each request, then the number of rows."""
    positions: torch.Tensor
    """[rows or more] position of each row's token in its request, on the device."""


@dataclass(slots=True)
class Pending:
    """A forward pass whose activations are on the host, or on their way to it."""

    request_ids: list[str]
    query_start: np.ndarray
    parts: list[np.ndarray] | Packed
    """Positions; the ticks of each hook, in the watch list's order; their activations; eligible;
    and what each of `acted` holds."""
    acted: list[str]
    """Digest of the clamps, for each hook and each of its clamps."""
    event: Any
    """None if there is nothing to wait for."""
    swaps: int


@dataclass(slots=True)
class WorkerGuard:
    """One worker's taps, and its state between forward passes."""

    watchlist: WatchList
    taps: tuple[Tap, ...]
    """The taps of the layers on this pipeline stage."""
    rows: Rows
    eligible_ids: torch.Tensor
    """[ids + 1] bool on the device: the token id is not excluded. The last is True; ids outside of
    the table use it."""
    device: torch.device
    last_stage: bool = True
    """Whether this is the last pipeline stage, which samples and hands forward passes over."""
    announced: dict[str, tuple[int, Admitted | None]] = field(default_factory=dict)
    """Prompt length and clamps of requests that have no clamp slot yet."""
    clamp_lists: dict[str, WatchList] = field(default_factory=dict)
    """By digest of the clamps in the taps: the watch list that they were compiled from."""
    swaps: int = 0
    """Number of the last swap that the taps have carried out."""
    slots: dict[str, int] = field(default_factory=dict)
    """Clamp slot by request id."""
    free: list[int] = field(default_factory=list)
    """Free clamp slots."""
    prompts: dict[str, np.ndarray] = field(default_factory=dict)
    """By id of each request with a clamp slot: [prompt tokens] indices into `ROLES`."""
    embedded: dict[str, np.ndarray] = field(default_factory=dict)
    """By id of each request whose prompt holds embeddings: [prompt tokens] bool, where."""
    computed: dict[str, int] = field(default_factory=dict)
    """By id of each request in the next forward pass: vLLM's `num_computed_tokens`."""
    current: Layout | None = None
    """Layout of the forward pass under way."""
    received: dict[int, Reading] = field(default_factory=dict)
    """What earlier pipeline stages read in the forward pass under way, by layer."""
    outgoing: dict[int, Reading] | None = None
    """Readings to send to the next pipeline stage, by layer."""
    pending: Pending | None = None
    buffers: Buffers = field(init=False)
    """Host buffers of the passes under way, if the model runs on a GPU."""
    tested: bool = False
    """Whether the start-up self-test has passed on this rank."""
    failures: list[str] = field(default_factory=list)
    """Messages of the self-test about what is wrong on this rank."""
    observation: Observation | None = None
    """What the self-test's uncompiled pass recorded; None before and after the test."""

    def __post_init__(self) -> None:
        """Start without buffers."""
        self.buffers = Buffers(pinned=self.device.type == "cuda")

    def admit(self, request_id: str) -> int:
        """Return a request's clamp slot, assigning one if it has none yet."""
        slot = self.slots.get(request_id)
        if slot is not None:
            return slot
        prompt_tokens, admitted = self.announced.pop(request_id)
        if admitted is None and self.tested:
            raise RuntimeError(
                f"saeguard: request {request_id} reached the model without the worker update that "
                "names its clamps"
            )
        if not self.free:
            raise RuntimeError(
                f"saeguard: no clamp slot is free for {request_id}: {len(self.slots)} requests are "
                "in flight"
            )
        slot = self.slots[request_id] = self.free.pop()
        roles = None if admitted is None else admitted.roles
        self.prompts[request_id] = (
            np.full(prompt_tokens, TEMPLATE, np.uint8) if roles is None else roles
        )
        for tap in self.taps:
            for digest, clamp in tap.clamps.items():
                policies = [self.clamp_lists[digest].policies[i] for i in clamp.policies]
                # The self-test compares with what the next layer consumes, so nothing edits before.
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

    def apply_update(self, update: WorkerUpdate) -> None:
        """Apply what the engine core sent with a step, before its forward pass.

        Raises:
            RuntimeError: an earlier update was lost, or clamps are missing.
        """
        if update.after != self.swaps:
            raise RuntimeError(
                f"saeguard: the taps are at swap {self.swaps} of the watch list, the engine core "
                f"expects swap {update.after}: this rank reads other rows than the rules judge"
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
                f"saeguard: this rank lacks the clamps {sorted(missing)} of admitted requests, "
                "which would go unclamped without any error"
            )

    def release(self, request_ids: Iterable[str]) -> None:
        """Free the clamp slots of requests that ended."""
        for request_id in request_ids:
            self.announced.pop(request_id, None)
            self.prompts.pop(request_id, None)
            self.embedded.pop(request_id, None)
            slot = self.slots.pop(request_id, None)
            if slot is not None:
                self.free.append(slot)

    @property
    def on_host(self) -> bool:
        """Return whether the model runs on the CPU, so that its tensors are the host's memory."""
        return self.device.type == "cpu"

    @property
    def clamps(self) -> bool:
        """Return whether the taps hold any clamps."""
        return any(tap.clamps for tap in self.taps)

    def begin_pass(
        self,
        request_ids: list[str],
        query_start: np.ndarray,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
    ) -> None:
        """Write the layout of the next forward pass into the buffers that the taps read.

        Args:
            request_ids: in row order.
            query_start: [requests + 1] first row of each, then the number of rows.
            input_ids: [rows or more] token ids, on the device.
            positions: [rows or more] position of each token in its request, on the device.
        """
        n, last = int(query_start[-1]), len(self.eligible_ids) - 1
        if self.on_host:
            ids = array_of(input_ids)[:n].clip(-1, last)
            array_of(self.rows.eligible)[:n] = array_of(self.eligible_ids)[ids]
        else:
            self.rows.eligible[:n] = self.eligible_ids[input_ids[:n].clamp(-1, last)]
        if self.embedded:  # rows whose token ids are not theirs
            where = fill_prompt_rows(
                np.zeros(n, bool), self.embedded, self.computed, request_ids, query_start
            )
            self.rows.eligible[:n] |= torch.from_numpy(where).to(self.device)
        if self.clamps:
            slots = [self.admit(r) for r in request_ids]
            roles = fill_prompt_rows(
                np.full(n, OUTPUT), self.prompts, self.computed, request_ids, query_start
            )
            lay_out(self.rows, slots, query_start, positions, roles)
        self.current = Layout(request_ids, query_start, positions)
        for tap in self.taps:
            if self.on_host:
                array_of(tap.ticks)[()] = 0
            else:
                tap.ticks.zero_()

    def end_pass(self) -> None:
        """Start to copy what the taps read; on an earlier pipeline stage, keep it for the next."""
        assert self.current is not None
        layout, self.current = self.current, None
        n = int(layout.query_start[-1])
        readings, self.received = self.received, {}
        first: Any = torch.Tensor.__getitem__
        if self.on_host and self.last_stage:  # where they are fetched on the spot
            first = _rows_on_host
        rows = slice(n)
        for tap in self.taps:
            acted = {digest: first(clamp.acted, rows) for digest, clamp in tap.clamps.items()}
            readings[tap.layer] = Reading(first(tap.f, rows), first(tap.ticks, None), acted)
        if not self.last_stage:
            self.outgoing = {layer: reading.copy() for layer, reading in readings.items()}
            return
        found = [readings[hook.layer] for hook in self.watchlist.hooks]
        tensors = [first(layout.positions, rows), *(reading.ticks for reading in found)]
        tensors += [*(reading.f for reading in found), first(self.rows.eligible, rows)]
        tensors += [where for reading in found for where in reading.acted.values()]
        parts: list[np.ndarray] | Packed
        event: Any = None
        if self.on_host:
            parts = [(t if isinstance(t, np.ndarray) else t.numpy()).copy() for t in tensors]
        else:
            parts = self.buffers.fetch(tensors)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        acted_by = [digest for reading in found for digest in reading.acted]
        self.pending = Pending(
            layout.request_ids, layout.query_start, parts, acted_by, event, self.swaps
        )

    def collect(self, pending: Pending) -> ForwardPass:
        """Wait for the copy of one forward pass and return it."""
        if pending.event is not None:
            pending.event.synchronize()
        parts = pending.parts
        arrays = self.buffers.unpack(parts) if isinstance(parts, Packed) else parts
        hooks = len(self.watchlist.hooks)
        positions, eligible = arrays[0], arrays[1 + 2 * hooks]
        ticks, f = arrays[1 : 1 + hooks], arrays[1 + hooks : 1 + 2 * hooks]
        acted: dict[str, list[np.ndarray]] = {}
        for digest, where in zip(pending.acted, arrays[2 + 2 * hooks :], strict=True):
            acted.setdefault(digest, []).append(where)
        return ForwardPass(
            request_ids=pending.request_ids,
            query_start=pending.query_start,
            positions=positions,
            eligible=eligible,
            f=f[0] if hooks == 1 else np.concatenate(f, axis=1),
            acted=None,
            ran=all(int(tick[0]) == 1 for tick in ticks),
            watchlist=self.watchlist.digest,
            swaps=pending.swaps,
            acted_by={digest: np.concatenate(a, axis=1) for digest, a in acted.items()},
        )
