"""Judge an invented text with a watch list before it judges requests."""

from __future__ import annotations

import numpy as np

from saeguard.errors import InputError
from saeguard.guard.forward_pass import ForwardPass
from saeguard.guard.ledger import Ledger
from saeguard.guard.scopes import ASSISTANT, SYSTEM, TOOL, USER
from saeguard.guard.watchlist import WatchList

TOKENS = 12
PROMPT_ROLES = np.array([SYSTEM, USER, ASSISTANT, TOOL], np.uint8)
"""The role of each token of the prompt."""


class RehearsalError(InputError):
    """A compiled watch list fails on an invented text, or its weights are not finite."""


def rehearse(watchlist: WatchList) -> None:
    """Run a watch list's rules once, over tokens on which no latent fires and on which all fire.

    So an error that would occur in the first step after a swap occurs in the compiler process.

    Raises:
        RehearsalError: weights or ranges are not finite, or the coverage does not add up.
    """
    tensors = [(f"layer {h.layer}", t) for h in watchlist.hooks for t in (h.W, h.b)]
    tensors += [
        (f"layer {c.layer}, clamps", t) for c in watchlist.clamps for t in (c.W_dec, c.target)
    ]
    for what, tensor in tensors:
        if not bool(tensor.isfinite().all()):
            raise RehearsalError(f"{what}: the rows to watch hold values that are not finite")
    finite = all(np.isfinite(weight).all() for _, weight in watchlist.mix)
    if not finite or not (watchlist.span > 0).all():
        raise RehearsalError("the features' weights or ranges are not finite")
    warm_up(watchlist)


def warm_up(watchlist: WatchList) -> None:
    """Run a watch list's rules once, so that the first request does not wait for their compilation.

    Raises:
        RehearsalError: the coverage does not add up.
    """
    ledger = Ledger(watchlist, slots=1)
    ledger.admit("rehearsal", len(PROMPT_ROLES), roles=PROMPT_ROLES)
    for first, end in ((0, TOKENS - 1), (TOKENS - 1, TOKENS)):  # a prompt, then one token
        f = np.zeros((end - first, watchlist.columns), np.float32)
        f[1::2] = 1000.0
        f[:, [hook.norm_column for hook in watchlist.hooks]] = 0.0  # no attention sink
        forward_pass = ForwardPass(
            request_ids=["rehearsal"],
            query_start=np.array([0, len(f)]),
            positions=np.arange(first, end),
            eligible=np.ones(len(f), bool),
            f=f,
            acted=None,
            ran=True,
            watchlist=watchlist.digest,
        )
        ledger.ingest(forward_pass, np.array([len(f)]))
    verdicts = ledger.finish("rehearsal", TOKENS + 1)
    if len(verdicts) != len(watchlist.policies) or not verdicts.balanced():
        raise RehearsalError("the coverage of an invented text does not add up")
