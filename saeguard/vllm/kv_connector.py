"""KV connectors under which a clamp's edit could leak, and what vLLM reads through a connector.

The KV of a clamped request holds the clamp's edits. vLLM's prefix cache keeps it apart by the
request's `cache_salt`. A connector that names stored KV by token ids alone would hand it to
requests that no policy clamps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from saeguard.errors import CannotRunError
from saeguard.vllm.patches import reads

if TYPE_CHECKING:
    from saeguard.guard.watchlist import WatchList

KEEPS_APART = {
    "LMCacheMPConnector": "sends the request's `cache_salt` with each look-up",
    "MooncakeConnector": "moves the KV of one request",
    "MooncakeStoreConnector": "names KV by block hash",
    "MoRIIOConnector": "moves the KV of one request",
    "NixlConnector": "moves the KV of one request",
    "NixlPullConnector": "moves the KV of one request",
    "NixlPushConnector": "moves the KV of one request",
    "OffloadingConnector": "names KV by block hash",
    "SimpleCPUOffloadConnector": "names KV by block hash",
}
"""Connectors that never hand a clamped request's KV to another request, and why (vLLM 0.32)."""

reads("vllm.config:VllmConfig", "kv_transfer_config", why="which KV connector is configured")
reads(
    "vllm.config:KVTransferConfig",
    "kv_connector",
    "kv_connector_module_path",
    "kv_connector_extra_config",
    why="which KV connector is configured",
)


class ConnectorError(CannotRunError):
    """A KV connector would hand the KV of clamped requests to others."""


def check_connector(vllm_config: Any, watchlist: WatchList) -> None:
    """Refuse clamps with a KV connector that is not known to keep clamped requests' KV apart.

    Raises:
        ConnectorError: names the connector and the policy.
    """
    transfer = vllm_config.kv_transfer_config
    if transfer is None or not watchlist.clamps:
        return
    policy = watchlist.policies[watchlist.clamps[0].policies[0]]
    for name in _connectors(
        transfer.kv_connector, transfer.kv_connector_module_path, transfer.kv_connector_extra_config
    ):
        if name not in KEEPS_APART:
            raise ConnectorError(
                f"{policy.path}: action: clamp, but the KV connector {name} "
                "(--kv-transfer-config) is not known to keep the KV of clamped requests apart from "
                "that of others, which would be edited, too; serve without clamp policies, or use "
                f"one of {', '.join(KEEPS_APART)}"
            )


def _connectors(name: str | None, module: str | None, extra: Mapping[str, Any]) -> Iterator[str]:
    """Return the name of a connector, or of all those that a `MultiConnector` consists of."""
    if name == "MultiConnector" and module is None:
        for part in extra.get("connectors", ()):
            yield from _connectors(
                part.get("kv_connector"),
                part.get("kv_connector_module_path"),
                part.get("kv_connector_extra_config") or {},
            )
    elif name is not None:
        yield name if module is None else f"{module}.{name}"
