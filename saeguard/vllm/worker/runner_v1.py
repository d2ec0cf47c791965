"""Model Runner V1 (`vllm.v1.worker.gpu_model_runner`): where a pass begins and ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from saeguard.vllm.worker import hooks as common


def execute_model(wrapped: Callable[..., Any], runner: Any, args: Any, kwargs: Any) -> Any:
    """Around `execute_model`; pooling models end here and deliver at once."""
    guard = common.guard_of(runner)
    if guard is None:
        return wrapped(*args, **kwargs)
    common.announce(guard, args, kwargs)
    return common.deliver(guard, wrapped(*args, **kwargs))


def model_forward(wrapped: Callable[..., Any], runner: Any, args: Any, kwargs: Any) -> Any:
    """Around `_model_forward`, which real batches pass through and dummy runs do not."""
    guard = common.guard_of(runner)
    if guard is None:
        return wrapped(*args, **kwargs)
    n = runner.input_batch.num_reqs
    query_start = runner.query_start_loc.np[: n + 1].copy()
    rows = int(query_start[-1])
    common.begin(
        runner,
        guard,
        list(runner.input_batch.req_ids[:n]),
        query_start,
        runner.input_ids.gpu[:rows],
        runner.positions[:rows],
    )
    result = wrapped(*args, **kwargs)
    common.end(runner, guard)
    return result
