"""The role that wrote each token, and the scopes that look at a role.

All output has the role `output`: the model cannot leave its scope by writing another role's marks.
Tokens that the chat template wrote around the prompt's messages have the role `template`. The part
of an answer that a request has the model continue has the role `continued`. It is in the prompt,
and in the output's scope too: else an answer that is asked for in pieces would not be looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias, get_args

import numpy as np

from saeguard.policy.types import Scope

Role: TypeAlias = Literal["template", "system", "user", "assistant", "tool", "output", "continued"]
ROLES: tuple[Role, ...] = get_args(Role)
TEMPLATE, SYSTEM, USER, ASSISTANT, TOOL, OUTPUT, CONTINUED = range(len(ROLES))
SCOPES: tuple[Scope, ...] = get_args(Scope)

LOOKS: Mapping[Scope, tuple[Role, ...]] = {
    "prompt": ("template", "system", "user", "assistant", "tool", "continued"),
    "output": ("output", "continued"),
    "both": ROLES,
    "assistant": ("assistant", "output", "continued"),
    "user": ("user",),
    "system": ("system",),
    "tool": ("tool",),
}
BY_ROLE: frozenset[Scope] = frozenset({"assistant", "user", "system", "tool"})
"""Scopes for which the role of each prompt token is needed."""
OF_OUTPUT: frozenset[Scope] = frozenset({"output"})
"""Scopes for which it matters whether the prompt ends with a part of the answer, where the chat
template identifies roles."""

MEMBERS = np.array([[role in LOOKS[scope] for scope in SCOPES] for role in ROLES])
"""[roles, scopes] bool: whether the scope looks at the role."""


def in_scopes(role: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """Return [..., scopes] bool, in the order of `SCOPES`: the token is in the scope and usable."""
    looked: np.ndarray = MEMBERS[role] & usable[..., None]
    return looked


def of_prompt(roles: np.ndarray | None, prompt_tokens: int) -> np.ndarray:
    """Return the roles of a prompt's tokens, [prompt_tokens] uint8.

    Raises:
        ValueError: `roles` is missing, or its length is not `prompt_tokens`.
    """
    if roles is None or len(roles) != prompt_tokens:
        found = "none" if roles is None else f"{len(roles)}"
        raise ValueError(
            f"a policy's scope is a role: expected {prompt_tokens} roles, one for each prompt "
            f"token, got {found}"
        )
    return roles.astype(np.uint8)


def roles_between(prompt: int, roles: np.ndarray | None, first: int, end: int) -> np.ndarray:
    """Return the roles of the positions `first` to `end - 1`, uint8 indices into `ROLES`.

    Args:
        prompt: tokens of the prompt.
        roles: [prompt tokens] of each; None if no policy needs them: then all are `template`.
        first: the first position.
        end: the position after the last.
    """
    out = np.full(max(0, end - first), OUTPUT, np.uint8)
    if first < prompt:
        out[: prompt - first] = TEMPLATE if roles is None else roles[first:end]
    return out


def count_roles(prompt: int, roles: np.ndarray | None, first: int, end: int) -> list[int]:
    """Return the number of tokens of each role among what `roles_between` returns."""
    counts = [0] * len(ROLES)
    if first >= end:
        return counts
    asked = max(0, min(end, prompt) - first)
    if roles is None:
        counts[TEMPLATE] = asked
    elif asked:
        counts = np.bincount(roles[first : first + asked], minlength=len(ROLES)).tolist()
    counts[OUTPUT] = end - first - asked
    return counts
