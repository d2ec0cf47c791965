"""Refuse modes of vLLM under which the taps would read only a part of a pass, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from saeguard.errors import CannotRunError
from saeguard.vllm.patches import reads

reads(
    "vllm.config:VllmConfig",
    "model_config",
    "parallel_config",
    "cache_config",
    "ec_transfer_config",
    "kv_transfer_config",
    why="refusing modes under which the guard would see a part of a pass, or nothing",
    differs="`kv_load_failure_policy` of the last is read if it exists",
)
reads(
    "vllm.config:ModelConfig",
    "runner_type",
    "is_encoder_decoder",
    why="refusing models that do not generate, or that read their prompt in an encoder",
    differs="`is_diffusion` is read if it exists",
)
reads(
    "vllm.config:ParallelConfig",
    "world_size",
    "tensor_parallel_size",
    "distributed_executor_backend",
    "enable_dbo",
    "decode_context_parallel_size",
    "prefill_context_parallel_size",
    why="refusing modes under which the guard would see a part of a pass, or judge requests twice",
    differs="`ubatch_size` and `enable_hc_sp` are read if they exist",
)
reads(
    "vllm.config:CacheConfig",
    "kv_sharing_fast_prefill",
    why="refusing a mode under which upper layers compute some tokens only",
)


class ModeError(CannotRunError):
    """The guard does not support a mode of vLLM that is switched on."""


class Mode(NamedTuple):
    """A mode of vLLM that the guard does not support."""

    is_on: Callable[[Any], bool]
    """Takes a `VllmConfig`."""
    name: str
    """With its flag."""
    why: str
    instead: str


PARALLEL = "use tensor, pipeline or data parallelism"
UNSUPPORTED = (
    Mode(
        lambda c: c.model_config.runner_type == "pooling",
        "pooling and embedding models are",
        "nothing is generated, so the start-up self-test cannot show that the guard sees the "
        "residual",
        "serve a model that generates",
    ),
    Mode(
        lambda c: c.model_config.is_encoder_decoder,
        "encoder-decoder models are",
        "the prompt goes through the encoder, which no tap reads",
        "serve a decoder-only model",
    ),
    Mode(
        lambda c: getattr(c.model_config, "is_diffusion", False),
        "diffusion language models are",
        "a position is computed many times, with other tokens, before its token is final",
        "serve an autoregressive model",
    ),
    Mode(
        lambda c: (
            c.parallel_config.world_size > 1
            and c.parallel_config.distributed_executor_backend == "external_launcher"
        ),
        "the external_launcher executor (--distributed-executor-backend) on several ranks is",
        "each rank would judge every request and write its events",
        "let vLLM start the ranks (mp or ray)",
    ),
    Mode(
        lambda c: c.parallel_config.enable_dbo or getattr(c.parallel_config, "ubatch_size", 0) > 1,
        "dual-batch overlap (--enable-dbo, --ubatch-size) is",
        "the model runs several times in a pass, each time on a part of the rows, and a tap keeps "
        "the last part only",
        "leave the flag out",
    ),
    Mode(
        lambda c: c.parallel_config.prefill_context_parallel_size > 1,
        "prefill context parallelism (--prefill-context-parallel-size) is",
        "each rank computes a part of a prompt's tokens, and its taps see only that part",
        PARALLEL,
    ),
    Mode(
        lambda c: c.parallel_config.decode_context_parallel_size > 1,
        "decode context parallelism (--decode-context-parallel-size) is",
        "the KV of a request lies in parts on several ranks, and it was never shown that the "
        "guard's records of cached blocks are right there",
        PARALLEL,
    ),
    Mode(
        lambda c: (
            getattr(c.parallel_config, "enable_hc_sp", False)
            and c.parallel_config.tensor_parallel_size > 1
        ),
        "sequence parallelism of hyper-connections (--enable-hc-sp) is",
        "each rank holds the residual stream of a part of the tokens",
        "leave the flag out",
    ),
    Mode(
        lambda c: c.cache_config.kv_sharing_fast_prefill,
        "fast prefill with shared KV (--kv-sharing-fast-prefill) is",
        "upper layers compute only the last token of a prompt, so their taps do not see the rest",
        "leave the flag out",
    ),
    Mode(
        lambda c: getattr(c.ec_transfer_config, "ec_role", None) == "ec_producer",
        "a server that only encodes images (--ec-transfer-config with ec_role ec_producer) is",
        "it runs no language model",
        "guard the server that reads its encodings",
    ),
    Mode(
        lambda c: getattr(c.kv_transfer_config, "kv_load_failure_policy", None) == "recompute",
        "going on after KV failed to load (--kv-transfer-config with kv_load_failure_policy "
        "recompute) is",
        "tokens that were computed from the missing KV have been judged by then",
        "use kv_load_failure_policy fail",
    ),
)


def check_mode(vllm_config: Any) -> None:
    """Refuse modes of vLLM that the guard does not support.

    Raises:
        ModeError: names every such mode, its flag, and why it is refused.
    """
    found = [
        f"{mode.name} not supported: {mode.why}; {mode.instead}, or remove `saeguard` from "
        "--additional-config to serve unguarded"
        for mode in UNSUPPORTED
        if mode.is_on(vllm_config)
    ]
    if found:
        raise ModeError("\n".join(found))
