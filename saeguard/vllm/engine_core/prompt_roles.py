"""Which role wrote each token of a request's prompt."""

from __future__ import annotations

from typing import Any

import numpy as np

from saeguard.guard.compiled_rules import Rules
from saeguard.guard.roles.assign import RoleMarks, continued_roles, roles_of
from saeguard.guard.scopes import USER
from saeguard.vllm.embedded import NO_TOKEN, embedded_positions
from saeguard.vllm.patches import reads

reads(
    "vllm.v1.request:Request",
    "prompt_token_ids",
    "num_prompt_tokens",
    why="roles are read from the token ids that the model sees",
)


def prompt_roles(request: Any, marks: RoleMarks | str, rules: Rules) -> np.ndarray | None:
    """Return the role of each prompt token, [tokens]; None if none matters to a policy.

    For policies on the output, roles matter if the prompt ends with a part of the answer. A prompt
    of embeddings has no chat template: all of it is the user's, as is any text that bypasses the
    template. Embeddings within a message are of the message's role.

    Args:
        request: vLLM's.
        marks: of the model's chat template, or why it has none; a policy whose scope is a role is
            refused then.
        rules: the policies.
    """
    if isinstance(marks, str) or not (rules.by_role or rules.of_output):
        return None
    if request.prompt_token_ids is None:
        return np.full(request.num_prompt_tokens, USER, np.uint8)
    ids = np.asarray(request.prompt_token_ids)
    embedded = embedded_positions(request)
    if embedded is not None:
        ids = np.where(embedded, NO_TOKEN, ids)
    ids = np.where(ids < 0, NO_TOKEN, ids)
    return roles_of(marks, ids) if rules.by_role else continued_roles(marks, ids)
