"""From what is known of each token of a prompt to the rows of a forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def fill_prompt_rows(
    out: np.ndarray,
    prompts: Mapping[str, np.ndarray],
    computed: Mapping[str, int],
    request_ids: Sequence[str],
    query_start: np.ndarray,
) -> np.ndarray:
    """Write the values of prompt tokens to their rows, and return `out`.

    Args:
        out: [rows]; other rows keep their value.
        prompts: by request id, [prompt tokens] values; requests may be missing.
        computed: by request id, vLLM's `num_computed_tokens`: the position of the first row. It is
            exact while a prompt is computed.
        request_ids: in row order.
        query_start: [requests + 1] first row of each, then the number of rows.
    """
    for i, request_id in enumerate(request_ids):
        prompt = prompts.get(request_id)
        if prompt is not None and computed[request_id] < len(prompt):
            start, end = int(query_start[i]), int(query_start[i + 1])
            here = prompt[computed[request_id] : computed[request_id] + end - start]
            out[start : start + len(here)] = here
    return out
