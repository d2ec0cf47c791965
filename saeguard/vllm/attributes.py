"""The attributes that the guard sets on vLLM's objects, one name and one type for each kind.

vLLM carries its own objects between the scheduler, the workers and the API server. The guard's data
about such an object travels with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from saeguard.guard.forward_pass import ForwardPass
    from saeguard.reload.worker_updates import WorkerUpdate
    from saeguard.vllm.api_server.told import Told
    from saeguard.vllm.engine_core.admission import Admission
    from saeguard.vllm.engine_core.guard import EngineGuard
    from saeguard.vllm.worker.guard import WorkerGuard

T = TypeVar("T")


class Attribute(Generic[T]):
    """One attribute of one kind of vLLM object."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        """Name the attribute."""
        self.name = name

    def get(self, owner: Any) -> T | None:
        """Return the value that was set on an object, None if none was."""
        value: T | None = getattr(owner, self.name, None)
        return value

    def set(self, owner: Any, value: T) -> None:
        """Set the value on an object."""
        setattr(owner, self.name, value)


WORKER_GUARD: Attribute[WorkerGuard] = Attribute("saeguard_worker")
"""Set on a model runner."""
ENGINE_GUARD: Attribute[EngineGuard] = Attribute("saeguard_engine")
"""Set on the `Scheduler` and its `KVCacheManager`."""
ADMISSION: Attribute[Admission] = Attribute("saeguard_admission")
"""Set on a scheduler's `Request`: which policies judge it."""
STREAMED: Attribute[frozenset[str]] = Attribute("saeguard_streamed")
"""Set on a scheduler's `Request`: policies of which its stream has told."""
WORKER_UPDATE: Attribute[WorkerUpdate] = Attribute("saeguard_update")
"""Set on a `SchedulerOutput`, which goes from the engine core to every rank."""
FORWARD_PASS: Attribute[ForwardPass] = Attribute("saeguard_pass")
"""Set on a `ModelRunnerOutput`, which goes from the last pipeline stage to the engine core."""
REQUEST_VERDICTS: Attribute[Mapping[str, Any]] = Attribute("saeguard_verdicts")
"""Set on a `RequestState` of the API server: the `saeguard` object, until its choice is built."""
TOLD_OF: Attribute[tuple[Told, int]] = Attribute("saeguard_told")
"""Set on a `RequestOutputCollector` of the API server: what the client request is told, and the
index of the collector's first choice."""
CHOICE_VERDICTS: Attribute[Mapping[str, Any]] = Attribute("saeguard")
"""Set on a `CompletionOutput`: the `saeguard` object. Public: `output.outputs[0].saeguard`."""
