"""Where a token stands: in whose turn of the prompt, or in the output; and which scopes look there.

What the model writes is the assistant's, whatever it writes: it cannot leave that scope by writing
another turn's opening. Of the prompt, the chat template's own marks are nobody's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias, get_args

import numpy as np

from saeguard.policy.types import Scope

Role: TypeAlias = Literal["template", "system", "user", "assistant", "tool", "output"]
ROLES: tuple[Role, ...] = get_args(Role)
TEMPLATE, SYSTEM, USER, ASSISTANT, TOOL, OUTPUT = range(len(ROLES))
SCOPES: tuple[Scope, ...] = get_args(Scope)

LOOKS: Mapping[Scope, tuple[Role, ...]] = {
    "prompt": ("template", "system", "user", "assistant", "tool"),
    "output": ("output",),
    "both": ROLES,
    "assistant": ("assistant", "output"),
    "user": ("user",),
    "system": ("system",),
    "tool": ("tool",),
}
BY_ROLE: frozenset[Scope] = frozenset({"assistant", "user", "system", "tool"})
"""Scopes that need a prompt's turns told apart."""

MEMBERS = np.array([[role in LOOKS[scope] for scope in SCOPES] for role in ROLES])
"""[places, scopes] bool."""


def in_scopes(role: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """Return [..., scopes] bool for tokens that can be used, in the order of `SCOPES`."""
    looked: np.ndarray = MEMBERS[role] & usable[..., None]
    return looked


def of_prompt(roles: np.ndarray | None, prompt_tokens: int) -> np.ndarray:
    """Return the places of a prompt's tokens, [prompt_tokens] uint8.

    Raises:
        ValueError: nobody has told them, or those of another number of tokens.
    """
    if roles is None or len(roles) != prompt_tokens:
        told = "none" if roles is None else len(roles)
        raise ValueError(
            f"a policy's scope is a role, so the prompt's {prompt_tokens} tokens need one each: "
            f"there are {told}"
        )
    return roles.astype(np.uint8)
