"""Which of vLLM's internals the guard relies on, and a check that each is there.

`CONTRACT.md` lists the same table for people, with the versions it was checked on.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


class ContractError(RuntimeError):
    """This version of vLLM lacks something the guard relies on."""


@dataclass(frozen=True, slots=True)
class Clause:
    """One internal: a callable and the parameters it must have, or an attribute."""

    module: str
    name: str
    parameters: tuple[str, ...] = ()
    wrapper: str | None = None
    """`module:function` in `saeguard.vllm` that is put around it."""


_RUNNER = "vllm.v1.worker.gpu_model_runner"
_CPU_RUNNER = "vllm.v1.worker.cpu_model_runner"
_RUNNER_2 = "vllm.v1.worker.gpu.model_runner"
_SCHEDULER = "vllm.v1.core.sched.scheduler"
_KV = "vllm.v1.core.kv_cache_manager"
_CHAT = "vllm.entrypoints.openai.chat_completion.serving"
_COMPLETION = "vllm.entrypoints.openai.completion.serving"
_OUTPUTS = "vllm.v1.engine.output_processor"

CLAUSES: tuple[Clause, ...] = (
    Clause(_RUNNER, "GPUModelRunner.load_model", (), "runner:load_model"),
    Clause(_CPU_RUNNER, "CPUModelRunner.load_model", (), "runner:load_model"),
    Clause(
        _RUNNER, "GPUModelRunner._model_forward", ("input_ids", "positions"), "v1:model_forward"
    ),
    Clause(_RUNNER, "GPUModelRunner.execute_model", ("scheduler_output",), "v1:execute_model"),
    Clause(_RUNNER, "GPUModelRunner.sample_tokens", (), "runner:sample_tokens"),
    Clause(_RUNNER_2, "GPUModelRunner.load_model", (), "runner:load_model"),
    Clause(_RUNNER_2, "GPUModelRunner.prepare_inputs", (), "v2:prepare_inputs"),
    Clause(_RUNNER_2, "GPUModelRunner.execute_model", ("scheduler_output",), "v2:execute_model"),
    Clause(_RUNNER_2, "dispatch_cg_and_sync_dp", ("need_eager",)),
    Clause(_RUNNER_2, "GPUModelRunner.sample_tokens", (), "runner:sample_tokens"),
    Clause("vllm.model_executor.models.utils", "PPMissingLayer"),
    Clause("vllm.distributed.parallel_state", "get_pp_group"),
    Clause("vllm.distributed.parallel_state", "GroupCoordinator.is_last_rank"),
    Clause("vllm.sequence", "IntermediateTensors", ("tensors",)),
    Clause("vllm.forward_context", "ForwardContext.skip_compiled"),
    Clause("vllm.forward_context", "ForwardContext.cudagraph_runtime_mode"),
    Clause(_SCHEDULER, "Scheduler.__init__", ("vllm_config",), "scheduler:init"),
    Clause(_SCHEDULER, "Scheduler.add_request", ("request",), "scheduler:add_request"),
    Clause(
        _SCHEDULER,
        "Scheduler.update_from_output",
        ("scheduler_output", "model_runner_output"),
        "scheduler:update_from_output",
    ),
    Clause(
        _SCHEDULER,
        "Scheduler._update_request_with_output",
        ("request", "new_token_ids"),
        "scheduler:update_request",
    ),
    Clause(_SCHEDULER, "Scheduler.finish_requests", (), "scheduler:finish_requests"),
    Clause(_SCHEDULER, "Scheduler.shutdown", (), "scheduler:shutdown"),
    Clause(
        "vllm.v1.engine.core", "EngineCore.__init__", ("vllm_config",), "scheduler:engine_core_init"
    ),
    Clause("vllm.v1.engine.core", "EngineCoreProc.run_busy_loop", (), "scheduler:run_busy_loop"),
    Clause("vllm.v1.engine.core", "DPEngineCoreProc.run_busy_loop", (), "scheduler:run_busy_loop"),
    Clause("vllm.v1.engine.core", "EngineCore.add_request", ("request",)),
    Clause("vllm.v1.engine.core", "EngineCore.post_step", ("model_executed",)),
    Clause("vllm.v1.executor", "Executor.collective_rpc", ("method",)),
    Clause(
        "vllm.v1.engine.core",
        "EngineCore.preprocess_add_request",
        ("request",),
        "scheduler:preprocess_add_request",
    ),
    Clause(_KV, "KVCacheManager.get_computed_blocks", ("request",), "scheduler:computed_blocks"),
    Clause(_KV, "KVCacheManager.reset_prefix_cache", (), "scheduler:reset_prefix_cache"),
    Clause("vllm.v1.core.block_pool", "BlockHashToBlockMap.get_one_block", ("key",)),
    Clause("vllm.v1.core.kv_cache_utils", "make_block_hash_with_group_id"),
    Clause("vllm.v1.request", "Request.num_tokens"),
    Clause("vllm.v1.request", "Request.update_block_hashes"),
    Clause("vllm.v1.request", "RequestStatus.FINISHED_STOPPED"),
    Clause(
        _OUTPUTS,
        "RequestState.make_request_output",
        ("new_token_ids", "pooling_output", "finish_reason", "stop_reason", "kv_transfer_params"),
        "api:make_request_output",
    ),
    Clause(
        _OUTPUTS, "OutputProcessor.process_outputs", ("engine_core_outputs",), "api:process_outputs"
    ),
    Clause(_OUTPUTS, "RequestState._new_completion_output", (), "api:new_completion_output"),
    Clause("vllm.outputs", "RequestOutput.add", ("next_output",), "api:add_output"),
    Clause(_CHAT, "OpenAIServingChat.create_chat_completion", ("request",), "api:create"),
    Clause(
        _CHAT,
        "OpenAIServingChat.chat_completion_full_generator",
        ("request", "result_generator"),
        "api:chat_full",
    ),
    Clause(
        _CHAT,
        "OpenAIServingChat.chat_completion_stream_generator",
        ("request", "result_generator"),
        "api:chat_stream",
    ),
    Clause(_COMPLETION, "OpenAIServingCompletion.create_completion", ("request",), "api:create"),
    Clause(
        _COMPLETION,
        "OpenAIServingCompletion.request_output_to_completion_response",
        ("final_res_batch",),
        "api:completion_full",
    ),
    Clause(
        _COMPLETION,
        "OpenAIServingCompletion.completion_stream_generator",
        ("request", "engine_inputs", "result_generator"),
        "api:completion_stream",
    ),
)


def missing(clause: Clause) -> str | None:
    """Return what this vLLM lacks of one clause, None where it is all there."""
    try:
        target: Any = importlib.import_module(clause.module)
    except ImportError as error:
        return f"{clause.module} cannot be imported ({error})"
    for part in clause.name.split("."):
        if not hasattr(target, part):
            return f"{clause.module}.{clause.name} is not there"
        target = getattr(target, part)
    if clause.parameters:
        has = set(inspect.signature(target).parameters)
        lacking = [p for p in clause.parameters if p not in has]
        if lacking:
            return f"{clause.module}.{clause.name} has no parameter {', '.join(lacking)}"
    return None


def check(clauses: Iterable[Clause] = CLAUSES) -> None:
    """Check the internals of the installed vLLM.

    Raises:
        ContractError: names the vLLM version and every missing piece.
    """
    lacking = [m for m in map(missing, clauses) if m is not None]
    if lacking:
        import vllm

        listed = "\n  ".join(lacking)
        raise ContractError(
            f"saeguard does not fit vLLM {vllm.__version__}; missing:\n  {listed}\n"
            "Install a version listed in saeguard/vllm/CONTRACT.md, or remove `saeguard` from "
            "--additional-config to serve unguarded."
        )
