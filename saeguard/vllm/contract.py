"""Which of vLLM's internals the guard relies on, and a check that each is there.

`CONTRACT.md` lists the same table for people, with the versions it was checked on.
"""

from __future__ import annotations

import dis
import importlib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from saeguard.errors import CannotRunError


class ContractError(CannotRunError):
    """This version of vLLM lacks something the guard relies on."""


@dataclass(frozen=True, slots=True)
class Clause:
    """One internal: a callable and what it is called with, or a class and what it holds."""

    module: str
    name: str
    parameters: tuple[str, ...] = ()
    """First parameters, `self` aside, in this order: wrappers find them by position or by name."""
    wrapper: str | None = None
    """`module:function` in `saeguard.vllm` that is put around it."""
    keywords: tuple[str, ...] = ()
    """Parameters at any place, found by name."""
    fields: tuple[str, ...] = ()
    """What instances of the class have: properties, declared fields, what its methods set."""


_RUNNER = "vllm.v1.worker.gpu_model_runner"
_CPU_RUNNER = "vllm.v1.worker.cpu_model_runner"
_RUNNER_2 = "vllm.v1.worker.gpu.model_runner"
_SCHEDULER = "vllm.v1.core.sched.scheduler"
_KV = "vllm.v1.core.kv_cache_manager"
_SCHEDULED = "vllm.v1.core.sched.output"
_CORE = "vllm.v1.engine.core"
_ENGINE = "vllm.v1.engine"
_ASYNC = "vllm.v1.engine.async_llm"
_OUTPUTS = "vllm.v1.engine.output_processor"
_CHAT = "vllm.entrypoints.openai.chat_completion.serving"
_COMPLETION = "vllm.entrypoints.openai.completion.serving"

_MODEL_RUNNER = ("vllm_config", "model_config", "scheduler_config", "device", "model")

CLAUSES: tuple[Clause, ...] = (
    # configuration
    Clause(
        "vllm.config",
        "VllmConfig",
        fields=(
            "additional_config",
            "model_config",
            "parallel_config",
            "scheduler_config",
            "compilation_config",
        ),
    ),
    Clause(
        "vllm.config",
        "ModelConfig",
        fields=(
            "model",
            "served_model_name",
            "dtype",
            "hf_text_config",
            "get_vocab_size",
            "tokenizer",
            "tokenizer_mode",
            "tokenizer_revision",
            "trust_remote_code",
            "skip_tokenizer_init",
        ),
    ),
    Clause(
        "vllm.config",
        "ParallelConfig",
        fields=("pipeline_parallel_size", "data_parallel_index"),
    ),
    Clause("vllm.config", "CompilationConfig", fields=("cudagraph_mode",)),
    Clause("vllm.config", "SchedulerConfig", fields=("max_num_batched_tokens", "max_num_seqs")),
    Clause("vllm.config", "CUDAGraphMode.NONE"),
    # Model Runner V1
    Clause(
        _RUNNER,
        "GPUModelRunner",
        fields=(*_MODEL_RUNNER, "input_batch", "query_start_loc", "input_ids", "positions"),
    ),
    Clause("vllm.v1.worker.gpu_input_batch", "InputBatch", fields=("num_reqs", "req_ids")),
    Clause("vllm.v1.utils", "CpuGpuBuffer", fields=("np", "gpu")),
    Clause(_RUNNER, "GPUModelRunner.load_model", wrapper="worker.hooks:load_model"),
    Clause(_CPU_RUNNER, "CPUModelRunner.load_model", wrapper="worker.hooks:load_model"),
    Clause(
        _RUNNER,
        "GPUModelRunner._model_forward",
        ("input_ids", "positions"),
        "worker.runner_v1:model_forward",
    ),
    Clause(
        _RUNNER,
        "GPUModelRunner.execute_model",
        ("scheduler_output",),
        "worker.runner_v1:execute_model",
    ),
    Clause(_RUNNER, "GPUModelRunner.sample_tokens", wrapper="worker.hooks:sample_tokens"),
    # Model Runner V2
    Clause(_RUNNER_2, "GPUModelRunner", fields=_MODEL_RUNNER),
    Clause(
        "vllm.v1.worker.gpu.input_batch",
        "InputBatch",
        fields=("num_reqs", "req_ids", "query_start_loc_np", "input_ids", "positions"),
    ),
    Clause(_RUNNER_2, "GPUModelRunner.load_model", wrapper="worker.hooks:load_model"),
    Clause(_RUNNER_2, "GPUModelRunner.prepare_inputs", wrapper="worker.runner_v2:prepare_inputs"),
    Clause(
        _RUNNER_2,
        "GPUModelRunner.execute_model",
        ("scheduler_output",),
        "worker.runner_v2:execute_model",
    ),
    Clause(_RUNNER_2, "dispatch_cg_and_sync_dp", keywords=("need_eager",)),
    Clause(_RUNNER_2, "GPUModelRunner.sample_tokens", wrapper="worker.hooks:sample_tokens"),
    # pipeline stages
    Clause("vllm.model_executor.models.utils", "PPMissingLayer"),
    Clause("vllm.distributed.parallel_state", "get_pp_group"),
    Clause("vllm.distributed.parallel_state", "GroupCoordinator.is_last_rank"),
    Clause("vllm.sequence", "IntermediateTensors", ("tensors",)),
    # what travels between runner and scheduler
    Clause(
        _SCHEDULED,
        "SchedulerOutput",
        fields=(
            "scheduled_new_reqs",
            "num_scheduled_tokens",
            "total_num_scheduled_tokens",
            "scheduled_spec_decode_tokens",
            "scheduled_cached_reqs",
            "finished_req_ids",
        ),
    ),
    Clause(
        _SCHEDULED,
        "CachedRequestData",
        fields=("req_ids", "num_computed_tokens", "resumed_req_ids"),
    ),
    Clause(
        _SCHEDULED,
        "NewRequestData",
        fields=(
            "req_id",
            "prompt_token_ids",
            "prompt_embeds",
            "sampling_params",
            "num_computed_tokens",
        ),
    ),
    Clause(
        "vllm.v1.outputs",
        "ModelRunnerOutput",
        fields=("req_ids", "req_id_to_index", "sampled_token_ids"),
    ),
    Clause("vllm.v1.outputs", "AsyncModelRunnerOutput.get_output"),
    Clause("vllm.forward_context", "get_forward_context"),
    Clause(
        "vllm.forward_context",
        "ForwardContext",
        fields=("skip_compiled", "cudagraph_runtime_mode"),
    ),
    # scheduler
    Clause(
        _SCHEDULER,
        "Scheduler",
        fields=("vllm_config", "requests", "kv_cache_manager", "block_size", "hash_block_size"),
    ),
    Clause(_SCHEDULER, "Scheduler.__init__", ("vllm_config",), "engine_core.hooks:init"),
    Clause(_SCHEDULER, "Scheduler.add_request", ("request",), "engine_core.hooks:add_request"),
    Clause(_SCHEDULER, "Scheduler.schedule", wrapper="engine_core.hooks:schedule"),
    Clause(
        _SCHEDULER,
        "Scheduler.update_from_output",
        ("scheduler_output", "model_runner_output"),
        "engine_core.hooks:update_from_output",
    ),
    Clause(
        _SCHEDULER,
        "Scheduler._update_request_with_output",
        ("request", "new_token_ids"),
        "engine_core.hooks:update_request",
    ),
    Clause(_SCHEDULER, "Scheduler.finish_requests", wrapper="engine_core.hooks:finish_requests"),
    Clause(_SCHEDULER, "Scheduler.shutdown", wrapper="engine_core.hooks:shutdown"),
    Clause(
        "vllm.v1.request",
        "Request",
        fields=(
            "request_id",
            "sampling_params",
            "lora_request",
            "num_tokens",
            "num_prompt_tokens",
            "num_stale_output_tokens",
            "drop_stale_output",
            "num_computed_tokens",
            "is_finished",
            "get_finished_reason",
            "block_hashes",
            "status",
            "stop_reason",
        ),
    ),
    Clause("vllm.v1.request", "RequestStatus.FINISHED_STOPPED"),
    # prefix cache
    Clause(
        _KV,
        "KVCacheManager",
        fields=("enable_caching", "block_pool", "num_kv_cache_groups", "empty_kv_cache_blocks"),
    ),
    Clause(
        _KV, "KVCacheManager.get_computed_blocks", ("request",), "engine_core.hooks:computed_blocks"
    ),
    Clause(
        _KV, "KVCacheManager.reset_prefix_cache", wrapper="engine_core.hooks:reset_prefix_cache"
    ),
    Clause(
        "vllm.v1.core.block_pool",
        "BlockPool",
        fields=("cached_block_hash_to_block", "num_gpu_blocks"),
    ),
    Clause("vllm.v1.core.block_pool", "BlockHashToBlockMap.get_one_block", ("key",)),
    Clause("vllm.v1.core.kv_cache_utils", "make_block_hash_with_group_id"),
    # engine core
    Clause(_CORE, "EngineCore", fields=("vllm_config", "scheduler", "step_fn", "model_executor")),
    Clause("vllm.v1.executor", "Executor.collective_rpc", ("method",)),
    Clause(_CORE, "EngineCore.__init__", ("vllm_config",), "engine_core.hooks:engine_core_init"),
    Clause(_CORE, "EngineCoreProc.run_busy_loop", wrapper="engine_core.hooks:run_busy_loop"),
    Clause(_CORE, "DPEngineCoreProc.run_busy_loop", wrapper="engine_core.hooks:run_busy_loop"),
    Clause(_CORE, "EngineCore.add_request", ("request", "request_wave")),
    Clause(_CORE, "EngineCore.post_step", keywords=("model_executed",)),
    Clause(
        _CORE,
        "EngineCore.preprocess_add_request",
        ("request",),
        "engine_core.hooks:preprocess_add_request",
    ),
    Clause(
        _ENGINE,
        "EngineCoreRequest",
        fields=(
            "request_id",
            "prompt_token_ids",
            "mm_features",
            "sampling_params",
            "pooling_params",
            "arrival_time",
            "lora_request",
            "cache_salt",
            "data_parallel_rank",
        ),
    ),
    Clause(_ENGINE, "EngineCoreOutputs", fields=("outputs",)),
    Clause(
        _ENGINE, "EngineCoreOutput", fields=("request_id", "finish_reason", "kv_transfer_params")
    ),
    Clause(
        "vllm.sampling_params",
        "SamplingParams",
        fields=("skip_reading_prefix_cache", "extra_args", "stop"),
    ),
    # API server
    Clause("starlette.applications", "Starlette.__call__", ("scope",), "api_server.tenants:call"),
    Clause(_ASYNC, "AsyncLLM.__init__", ("vllm_config",), "engine_core.reload:forward"),
    Clause(_ASYNC, "AsyncLLM", fields=("vllm_config",)),
    Clause(
        _ASYNC,
        "AsyncLLM.add_request",
        ("request_id", "prompt", "params"),
        "api_server.tenants:add_request",
        keywords=("lora_request",),
    ),
    Clause("vllm.lora.request", "LoRARequest", fields=("lora_name",)),
    Clause(
        _OUTPUTS,
        "OutputProcessor.process_outputs",
        ("engine_core_outputs",),
        "api_server.hooks:process_outputs",
    ),
    Clause(
        _OUTPUTS,
        "RequestState.make_request_output",
        wrapper="api_server.hooks:make_request_output",
        keywords=("kv_transfer_params",),
    ),
    Clause(
        _OUTPUTS,
        "RequestState._new_completion_output",
        wrapper="api_server.hooks:new_completion_output",
    ),
    Clause("vllm.outputs", "CompletionOutput", fields=("index", "finish_reason")),
    Clause("vllm.outputs", "RequestOutput", fields=("outputs",)),
    Clause("vllm.outputs", "RequestOutput.add", ("next_output",), "api_server.hooks:add_output"),
    Clause(_CHAT, "OpenAIServingChat", fields=("engine_client",)),
    Clause(
        _CHAT, "OpenAIServingChat.create_chat_completion", ("request",), "api_server.hooks:create"
    ),
    Clause(_CHAT, "OpenAIServingChat.create_error_response", keywords=("err_type", "status_code")),
    Clause(
        _CHAT,
        "OpenAIServingChat.chat_completion_full_generator",
        ("request", "result_generator"),
        "api_server.hooks:chat_full",
    ),
    Clause(
        _CHAT,
        "OpenAIServingChat.chat_completion_stream_generator",
        ("request", "result_generator"),
        "api_server.hooks:chat_stream",
    ),
    Clause(_CHAT, "ChatCompletionRequest", fields=("vllm_xargs", "model")),
    Clause(_COMPLETION, "OpenAIServingCompletion", fields=("engine_client",)),
    Clause(
        _COMPLETION,
        "OpenAIServingCompletion.create_completion",
        ("request",),
        "api_server.hooks:create",
    ),
    Clause(
        _COMPLETION,
        "OpenAIServingCompletion.create_error_response",
        keywords=("err_type", "status_code"),
    ),
    Clause(
        _COMPLETION,
        "OpenAIServingCompletion.request_output_to_completion_response",
        ("final_res_batch",),
        "api_server.hooks:completion_full",
    ),
    Clause(
        _COMPLETION,
        "OpenAIServingCompletion.completion_stream_generator",
        ("request", "engine_inputs", "result_generator"),
        "api_server.hooks:completion_stream",
    ),
    Clause(_COMPLETION, "CompletionRequest", fields=("vllm_xargs", "n", "model")),
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
    where = f"{clause.module}.{clause.name}"
    if clause.parameters or clause.keywords:
        has = [p for p in inspect.signature(target).parameters if p != "self"]
        lacking = [p for p in (*clause.parameters, *clause.keywords) if p not in has]
        if lacking:
            return f"{where} has no parameter {', '.join(lacking)}"
        if tuple(has[: len(clause.parameters)]) != clause.parameters:
            expected, found = ", ".join(clause.parameters), ", ".join(has)
            return f"{where} takes ({found}), expected to begin with ({expected})"
    lacking = [f for f in clause.fields if not _holds(target, f)]
    return f"{where} has no {', '.join(lacking)}" if lacking else None


def _holds(cls: type, field: str) -> bool:
    """Return whether instances of a class have a field, as far as the class itself tells."""
    declared = {
        *getattr(cls, "__dataclass_fields__", ()),
        *getattr(cls, "__pydantic_fields__", ()),
    }
    return (
        hasattr(cls, field) or field in declared or any(_sets(base, field) for base in cls.__mro__)
    )


def _sets(cls: type, field: str) -> bool:
    """Return whether a method of a class assigns the field."""
    methods = (inspect.unwrap(m) for m in vars(cls).values() if callable(m))
    return any(
        i.opname == "STORE_ATTR" and i.argval == field
        for m in methods
        if isinstance(m, FunctionType) and field in m.__code__.co_names
        for i in dis.get_instructions(m)
    )


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
