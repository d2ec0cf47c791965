"""Tie the prefix store to vLLM's prefix cache, and let requests skip cached prefixes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import structlog

from saeguard.guard.prefix.store import PrefixStore
from saeguard.guard.watchlist import WatchList
from saeguard.vllm.attributes import ENGINE_GUARD
from saeguard.vllm.patches import Original, assumes, calls, patch, reads
from saeguard.vllm.settings import Settings

if TYPE_CHECKING:
    from saeguard.vllm.engine_core.guard import EngineGuard

log = structlog.get_logger("saeguard")

MANAGER = "vllm.v1.core.kv_cache_manager:KVCacheManager"

reads(
    "vllm.v1.core.sched.scheduler:Scheduler",
    "kv_cache_manager",
    "block_size",
    "hash_block_size",
    why="the size of the prefix store and of its blocks",
)
reads(
    "vllm.v1.core.sched.scheduler:Scheduler",
    "connector",
    why="`uncached: recompute` of KV that comes through a connector",
)
calls(
    "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1"
    ".get_num_new_matched_tokens",
    "request",
    "num_computed_tokens",
    why="`uncached: recompute` of KV that comes through a connector; wrapped on the instance, "
    "since each connector has a class of its own",
)
assumes(
    "a connector whose `get_num_new_matched_tokens` found tokens accepts that the scheduler loads "
    "none of them",
    why="requests whose policies need every token read; vLLM itself does so for "
    "`skip_reading_prefix_cache`",
)
reads(
    MANAGER,
    "enable_caching",
    "block_pool",
    "num_kv_cache_groups",
    "empty_kv_cache_blocks",
    why="whether prefixes are cached, how many, and the result of a look-up that finds none",
)
reads(
    "vllm.v1.core.block_pool:BlockPool",
    "cached_block_hash_to_block",
    "num_gpu_blocks",
    why="whether a block is still in the cache",
)
calls(
    "vllm.v1.core.block_pool:BlockHashToBlockMap.get_one_block",
    "key",
    why="whether a block is still in the cache",
)
calls(
    "vllm.v1.core.kv_cache_utils:make_block_hash_with_group_id",
    why="the cache's key of a block",
)


def prefix_store_of(scheduler: Any, watchlist: WatchList, settings: Settings) -> PrefixStore | None:
    """Return a prefix store as large as the prefix cache; None if nothing is cached or watched."""
    manager = scheduler.kv_cache_manager
    if not manager.enable_caching or not watchlist.hooks:
        return None
    from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

    block = scheduler.hash_block_size
    groups = range(manager.num_kv_cache_groups)
    tokens = manager.block_pool.num_gpu_blocks * scheduler.block_size

    def in_cache(key: bytes) -> bool:
        cached = manager.block_pool.cached_block_hash_to_block  # a new one after each reset
        return any(
            cached.get_one_block(make_block_hash_with_group_id(key, group)) is not None
            for group in groups
        )

    store = PrefixStore(
        block,
        watchlist.columns,
        blocks=tokens // block,
        limit_bytes=settings.memory_mib * 2**20,
        in_cache=in_cache,
    )
    most = min(store.worst_bytes, store.limit_bytes) / 2**20
    log.info(
        "saeguard records cached prefixes",
        kv_cache_tokens=tokens,
        at_most_mib=round(most, 1),
        bytes_per_fired_latent=8,
    )
    return store


@patch(
    f"{MANAGER}.get_computed_blocks",
    why="`uncached: recompute`: a cached prefix that the taps never read is computed again",
    differs="takes `max_cache_hit_length`, too, from 0.33; passed through",
)
def computed_blocks(original: Original, manager: Any, request: Any) -> Any:
    """Find a request's cached prefix; find none if a policy needs records that do not exist.

    vLLM then computes the whole prompt again, so that the taps read it.
    """
    found = original()
    guard = ENGINE_GUARD.get(manager)
    if guard is None or not found[1] or not guard.recomputes(request, found[1]):
        return found
    return (manager.empty_kv_cache_blocks, *(0 for _ in found[1:]))


def skip_unread(scheduler: Any, guard: EngineGuard) -> None:
    """Let the scheduler's KV connector find nothing for requests that must compute their prompt.

    Those are requests with a policy that needs records that do not exist, and clamped requests.
    """
    connector = scheduler.connector
    if connector is None:
        return
    find = connector.get_num_new_matched_tokens

    def find_read(request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        found: tuple[int | None, bool] = find(request, num_computed_tokens)
        if found[0] and (
            request.skip_reading_prefix_cache
            or guard.recomputes(request, num_computed_tokens + found[0])
        ):
            return 0, False
        return found

    connector.get_num_new_matched_tokens = find_read
    if not getattr(connector, "supports_divergent_local_hybrid_hits", False):
        return
    manager = scheduler.kv_cache_manager
    find_local = manager.get_computed_blocks_for_connector

    def find_read_local(request: Any) -> Any:
        found = find_local(request)
        if not found[1] or not guard.recomputes(request, found[1]):
            return found
        return (manager.empty_kv_cache_blocks, *(type(n)(0) for n in found[1:]))

    manager.get_computed_blocks_for_connector = find_read_local


@patch(f"{MANAGER}.reset_prefix_cache", why="dropping what was recorded of blocks that are gone")
def reset_prefix_cache(original: Original, manager: Any) -> Any:
    """Empty the prefix store with the cache, since weights may have changed."""
    done = original()
    guard = ENGINE_GUARD.get(manager)
    if guard is not None and guard.prefix_store is not None and done:
        guard.prefix_store.clear()
    return done
