"""What became of the tokens of a request, by scope, and the coverage that verdicts report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from saeguard.guard.scopes import MEMBERS, ROLES, SCOPES, count_roles
from saeguard.guard.state import State
from saeguard.guard.tables import CACHED, ERROR, EVALUATED, FATES, MASSIVE, SPECIAL, UNTRACKED
from saeguard.guard.verdict import Coverage, Reason

NOT_FORWARDED, ABORTED, TOKENS = range(FATES, FATES + 3)
"""Columns of `fates_of` behind the ledger's own: two more reasons, and all tokens."""
_REASONS: tuple[tuple[int, Reason], ...] = (
    (SPECIAL, "special_token"),
    (MASSIVE, "massive_norm"),
    (CACHED, "prefix_cached"),
    (ERROR, "error"),
    (UNTRACKED, "untracked"),
    (NOT_FORWARDED, "not_forwarded"),
    (ABORTED, "aborted"),
)
EVERYWHERE = SCOPES.index("both")
"""The scope that looks at all tokens, whatever the policies' scopes."""
_LOOKS = np.ascontiguousarray(MEMBERS.T.astype(np.int64))
"""[scopes, roles] 1 if the scope looks at the role."""


def fates_of(s: State, slot: int, roles: np.ndarray | None, tokens: int) -> list[list[int]]:
    """Return what became of the tokens of each scope, for a request of `tokens` tokens.

    Args:
        s: the state.
        slot: of the request.
        roles: [prompt tokens] role of each; None if no policy needs them.
        tokens: prompt and output tokens.

    Returns:
        [scopes][fates]: the ledger's `EVALUATED` to `MASSIVE`, then `NOT_FORWARDED` to `TOKENS`.
    """
    prompt, after = (int(s.requests[slot][name]) for name in ("prompt", "next"))
    after = min(after, tokens)
    # The last token is never forwarded; other missing tokens were cut off by an abort.
    last = max(after, tokens - 1)
    counts = np.empty((len(ROLES), TOKENS + 1), np.int64)
    counts[:, :FATES] = s.counts[slot]
    counts[:, NOT_FORWARDED] = count_roles(prompt, roles, last, tokens)
    counts[:, ABORTED] = count_roles(prompt, roles, after, last)
    counts[:, TOKENS] = count_roles(prompt, roles, 0, tokens)
    fates: list[list[int]] = (_LOOKS @ counts).tolist()
    return fates


def coverage_of(fates: Sequence[int]) -> Coverage:
    """Return the coverage of one scope, from its row of `fates_of`."""
    skipped = {reason: fates[what] for what, reason in _REASONS if fates[what]}
    return Coverage(fates[TOKENS], fates[EVALUATED], skipped)


def left_out(tokens: int) -> Coverage:
    """Return the coverage of a policy whose sample leaves the request out."""
    return Coverage(tokens, 0, {"not_sampled": tokens} if tokens else {})
