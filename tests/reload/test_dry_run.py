"""A list is rehearsed before it judges, whatever its policies look at."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from saeguard.guard.scopes import SCOPES
from saeguard.policy.types import Name, Scope, Selection
from saeguard.reload.dry_run import RehearsalError, rehearse
from tests.guard.watchlists import make_policy, make_watchlist


@pytest.mark.parametrize("scope", SCOPES)
def test_every_scope(scope: Scope) -> None:
    """A sound list passes, and one whose ranges are none does not."""
    sound = make_watchlist([make_policy("p", Name("a"), {"a": Selection("f0", 0.5)}, scope=scope)])

    rehearse(sound)
    with pytest.raises(RehearsalError, match="ranges are not finite"):
        rehearse(replace(sound, span=np.zeros_like(sound.span)))
