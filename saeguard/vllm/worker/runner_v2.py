"""Model Runner V2 (`vllm.v1.worker.gpu.model_runner`): where a pass begins and ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from saeguard.vllm.selftest import EAGER
from saeguard.vllm.worker import hooks as common


def execute_model(wrapped: Callable[..., Any], runner: Any, args: Any, kwargs: Any) -> Any:
    """Around `execute_model`, real or dummy; only real passes go through `prepare_inputs`."""
    guard = common.guard_of(runner)
    if guard is None:
        return wrapped(*args, **kwargs)
    scheduled = common.announce(guard, args, kwargs)
    if not guard.tested and EAGER in scheduled.num_scheduled_tokens:
        with _eager():
            result = wrapped(*args, **kwargs)
    else:
        result = wrapped(*args, **kwargs)
    common.end(runner, guard)
    return common.deliver(guard, result)


@contextmanager
def _eager() -> Iterator[None]:
    """Keep one pass of the self-test from replaying a captured graph, which runs no hook."""
    from vllm.v1.worker.gpu import model_runner

    dispatch = model_runner.dispatch_cg_and_sync_dp

    def eagerly(*args: Any, **kwargs: Any) -> Any:
        return dispatch(*args, **{**kwargs, "need_eager": True})

    model_runner.dispatch_cg_and_sync_dp = eagerly
    try:
        yield
    finally:
        model_runner.dispatch_cg_and_sync_dp = dispatch


def prepare_inputs(wrapped: Callable[..., Any], runner: Any, args: Any, kwargs: Any) -> Any:
    """Around `prepare_inputs`: its batch says which row is whose."""
    batch = wrapped(*args, **kwargs)
    guard = common.guard_of(runner)
    if guard is not None:
        n = batch.num_reqs
        query_start = batch.query_start_loc_np[: n + 1].copy()
        rows = int(query_start[-1])
        common.begin(
            runner,
            guard,
            list(batch.req_ids[:n]),
            query_start,
            batch.input_ids[:rows],
            batch.positions[:rows],
        )
    return batch
