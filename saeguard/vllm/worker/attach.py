"""Hook taps after the decoder layers of a vLLM model that was just loaded."""

from __future__ import annotations

import math
from typing import Any

import structlog
import torch

from saeguard.features.massive import NO_BOUND
from saeguard.features.model_fit import ModelFitError, sae_misfit
from saeguard.guard.forward_pass import allocate_rows
from saeguard.guard.install_taps import install_taps
from saeguard.guard.tap import TAPS, fingerprint
from saeguard.guard.watchlist import WatchList, clamps_digest
from saeguard.vllm.kv_connector import check_connector
from saeguard.vllm.messages import KEY
from saeguard.vllm.model_fit import check_models
from saeguard.vllm.patches import calls, reads
from saeguard.vllm.settings import Settings
from saeguard.vllm.startup import start
from saeguard.vllm.worker.guard import WorkerGuard
from saeguard.vllm.worker.layers import decoder_layers, hook_layer, is_here
from saeguard.vllm.worker.unsupported import check_mode

log = structlog.get_logger("saeguard")

SPARE_SLOTS = 2
"""Clamp slots per request that can run at once, since preempted requests keep theirs."""
PADDING = 8
"""Extra rows of the buffers, since vLLM pads captured batches."""

reads(
    "vllm.config:VllmConfig",
    "additional_config",
    "model_config",
    "scheduler_config",
    why="vLLM hashes `additional_config` into its compile key; `graph` in it names the hooked "
    "layers and a digest of the tap, so that a compiled artefact without the tap has another key",
)
reads(
    "vllm.config:ModelConfig",
    "hf_text_config",
    "get_vocab_size",
    why="whether the watch list fits the model; the size of the table of excluded tokens",
)
reads(
    "vllm.config:SchedulerConfig",
    "max_num_batched_tokens",
    "max_num_seqs",
    why="sizes of the row buffers and of the clamp state",
)
calls(
    "vllm.distributed.parallel_state:get_pp_group",
    why="whether forward passes are handed to the engine core from this pipeline stage",
)
reads(
    "vllm.distributed.parallel_state:GroupCoordinator",
    "is_last_rank",
    why="whether forward passes are handed to the engine core from this pipeline stage",
)


def prepare(vllm_config: Any, settings: Settings) -> WatchList:
    """Compile the watch list before the model is built, so that a mistake costs seconds.

    Raises:
        ModeError: a mode of vLLM that is switched on is not supported.
        ConnectorError: a KV connector would hand the KV of clamped requests to others.
    """
    check_mode(vllm_config)
    watchlist = start(settings).watchlist
    check_connector(vllm_config, watchlist)
    _mark_graph(vllm_config, watchlist)
    return watchlist


def _mark_graph(vllm_config: Any, watchlist: WatchList) -> None:
    """Make vLLM's compile hash depend on the tapped layers and on the tap's fingerprint."""
    layers = ",".join(str(hook.layer) for hook in watchlist.hooks)
    vllm_config.additional_config[KEY] = {
        **vllm_config.additional_config[KEY],
        "graph": f"tap {fingerprint()} resid_post {layers}",
    }


def attach(model: Any, vllm_config: Any, watchlist: WatchList, device: torch.device) -> WorkerGuard:
    """Check that the watch list fits the model, and hook the taps to its layers.

    Raises:
        ModelFitError: width, depth or weights do not fit; both values are in the message.
        ModelError: the decoder layers are not found.
    """
    from vllm.distributed.parallel_state import get_pp_group

    shape = check_models(vllm_config.model_config, watchlist.models)
    for hook in watchlist.hooks:
        wrong = sae_misfit(hook.d_in, hook.layer, shape)
        if wrong:
            raise ModelFitError(wrong)
    layers = decoder_layers(model, shape.num_layers)
    scheduler = vllm_config.scheduler_config
    slots = SPARE_SLOTS * scheduler.max_num_seqs
    max_tokens = max(scheduler.max_num_batched_tokens, scheduler.max_num_seqs) + PADDING
    here = tuple(hook for hook in watchlist.hooks if is_here(layers[hook.layer]))
    taps = install_taps(watchlist, max_tokens=max_tokens, slots=slots, device=device, hooks=here)
    for tap in taps:
        hook_layer(layers, tap.layer)
    # A tokenizer may have more ids than the model, such as that of an image's placeholder.
    ids = max(vllm_config.model_config.get_vocab_size(), *watchlist.exclude_tokens, 0) + 1
    eligible_ids = torch.ones(ids + 1, dtype=torch.bool)
    eligible_ids[list(watchlist.exclude_tokens)] = False
    guard = WorkerGuard(
        watchlist=watchlist,
        taps=taps,
        rows=taps[0].rows if taps else allocate_rows(max_tokens, device),
        eligible_ids=eligible_ids.to(device),
        device=device,
        last_stage=get_pp_group().is_last_rank,
        free=list(range(1, slots + 1))[::-1],
        clamp_lists={clamps_digest(watchlist): watchlist},
    )
    log.info("saeguard taps installed", layers=sorted(TAPS), rows=watchlist.encoder_rows)
    _log_sinks(watchlist)
    for name, found in sorted(watchlist.approximations.items()):
        log.warning(
            "saeguard reads TopK latents by thresholds, not by rank",
            feature_set=name,
            how=found.in_words,
        )
    for tap in taps:
        for ranked in tap.ranked:
            log.info(
                "saeguard ranks latents exactly, so it holds the encoder of all competitors",
                layer=tap.layer,
                latents=len(ranked.competitors.rows.b),
                mib=round(ranked.competitors.nbytes() / 2**20, 1),
            )
    return guard


def _log_sinks(watchlist: WatchList) -> None:
    """Log which tokens are left out as attention sinks; warn of layers at which none are."""
    bounds = {hook.layer: hook.max_norm for hook in watchlist.hooks if hook.max_norm < math.inf}
    log.info("saeguard leaves out attention sinks", max_norm=bounds, found=dict(watchlist.sinks))
    without = [hook.layer for hook in watchlist.hooks if hook.layer not in bounds]
    if without:
        log.warning(
            "saeguard evaluates attention sinks like other tokens, and policies may match on them",
            layers=without,
            why=NO_BOUND,
        )
