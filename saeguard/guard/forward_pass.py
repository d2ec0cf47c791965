"""What one forward pass saw, on its way from the model's process to the rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """The watched activations of one pass and the requests they belong to.

    Attributes:
        request_ids: in row order.
        query_start: [requests + 1] first row of each request, then the number of rows.
        positions: [rows] position of each row's token in its request.
        watched: [rows] bool, False for tokens excluded by id.
        f: [rows, columns] float32 activations.
        acted: [rows, clamp policies] bool, where a clamp edited the row; None without clamps.
        ran: whether every tap ran in this pass; if not, `f` is stale and nothing was seen.
        watchlist: digest of the watch list that the model's process was started with.
        orders: swaps of the watch list that its taps had carried out before the pass.
        acted_by: `acted` by digest of the clamps, where several lists have requests under way;
            `saeguard.reload.versions` picks each request's own.
    """

    request_ids: list[str]
    query_start: np.ndarray
    positions: np.ndarray
    watched: np.ndarray
    f: np.ndarray
    acted: np.ndarray | None
    ran: bool
    watchlist: str
    orders: int = 0
    acted_by: Mapping[str, np.ndarray] = field(default_factory=dict)

    def of_requests(self, which: Sequence[int]) -> ForwardPass:
        """Return what the pass holds of some of its requests."""
        start, end = self.query_start[:-1][which], self.query_start[1:][which]
        rows = np.concatenate([np.arange(a, b) for a, b in zip(start, end, strict=True)])
        return replace(
            self,
            request_ids=[self.request_ids[i] for i in which],
            query_start=np.concatenate([[0], np.cumsum(end - start)]),
            positions=self.positions[rows],
            watched=self.watched[rows],
            f=self.f[rows],
            acted=None if self.acted is None else self.acted[rows],
            acted_by={digest: acted[rows] for digest, acted in self.acted_by.items()},
        )


def in_step(passes: Sequence[tuple[ForwardPass, np.ndarray, object]]) -> int:
    """Return how many of the leading passes bring the next token of the same requests.

    Args:
        passes: each with [requests] rows that count.
    """
    first = passes[0][0]
    requests = len(first.request_ids)
    for n, (forward_pass, valid, _) in enumerate(passes):
        if (
            forward_pass.request_ids != first.request_ids
            or len(forward_pass.positions) != requests
            or not forward_pass.ran
            or (valid != 1).any()
            or (forward_pass.positions != first.positions + n).any()
        ):
            return max(n, 1)
    return len(passes)
