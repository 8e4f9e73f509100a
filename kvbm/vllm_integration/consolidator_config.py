# SPDX-License-Identifier: Apache-2.0
"""Whether and where an engine's KV events are consolidated, from vLLM's configuration.

The first two functions are upstream's; `dynamo.vllm` calls the second before it starts the
engine, and passes its answer in `additional_config["consolidator_endpoints"]`. Without it, as under
`vllm serve`, the engine asks for itself.

Each data-parallel rank has a consolidator of its own: rank r hears its own engine, whose publisher
vLLM moves up by r ports, and publishes r ports above rank 0.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_events import ZmqEventPublisher

from kvbm.config import Settings
from kvbm.events.endpoints import (
    OUTPUT_PORTS_ABOVE,
    REPLAY_PORTS_ABOVE,
    checked_port,
    if_possible,
    ports_above,
)
from kvbm.vllm_integration.engine import settings_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from kvbm.events.zmq_consolidator import Consolidator, Endpoints

logger = logging.getLogger(__name__)

CONNECTOR = "DynamoConnector"


def should_enable_consolidator(vllm_config: VllmConfig) -> bool:
    """Whether vLLM publishes events, caches prefixes, has our connector, and nobody says no."""
    return why_not(vllm_config, settings_of(vllm_config)) is None


def why_not(vllm_config: VllmConfig, settings: Settings) -> str | None:
    """What stands against a consolidator; None if nothing does."""
    if not settings.kv_events_enable_consolidator:
        return "DYN_KVBM_KV_EVENTS_ENABLE_CONSOLIDATOR says no"
    if not _has_connector(vllm_config):
        return f"the connector is not {CONNECTOR}"
    events = getattr(vllm_config, "kv_events_config", None)
    if events is None or not events.enable_kv_cache_events or events.publisher != "zmq":
        return "vLLM publishes no KV events (kv_events_config)"
    if not _is_bound(events.endpoint):
        return f"vLLM's publisher binds no known port: endpoint={events.endpoint!r}"
    if not vllm_config.cache_config.enable_prefix_caching:
        return "prefix caching is off"
    return None


def _is_bound(endpoint: str) -> bool:
    """Whether vLLM binds an endpoint instead of connecting to it, and to a port that is known."""
    everywhere = "*" in endpoint or "::" in endpoint or "0.0.0.0" in endpoint
    return not endpoint.endswith(":0") and (
        everywhere or endpoint.startswith(("ipc://", "inproc://"))
    )


def _has_connector(vllm_config: VllmConfig) -> bool:
    transfer = vllm_config.kv_transfer_config
    extra = getattr(transfer, "kv_connector_extra_config", None)
    inside = extra.get("connectors") if isinstance(extra, Mapping) else None
    names = [getattr(transfer, "kv_connector", None)]
    names += [one.get("kv_connector") for one in inside or () if isinstance(one, Mapping)]
    return CONNECTOR in names


def get_consolidator_endpoints(vllm_config: VllmConfig) -> tuple[str, str, str] | None:
    """Endpoints of data-parallel rank 0; None if there is to be no consolidator.

    Returns
    -------
    tuple of str
        vLLM's publisher, to connect to; the output, to be bound; the output, to connect to.

    Raises
    ------
    ValueError
        The output's port would be above 65535.
    """
    settings = settings_of(vllm_config)
    reason = why_not(vllm_config, settings)
    if reason is not None:
        logger.info("KV events are not consolidated: %s", reason)
        return None
    port = checked_port(settings.leader_zmq_pub_port + OUTPUT_PORTS_ABOVE)
    engine = _to_connect_to(vllm_config.kv_events_config.endpoint)
    return engine, f"tcp://0.0.0.0:{port}", f"tcp://127.0.0.1:{port}"


def _to_connect_to(endpoint: str) -> str:
    """Where to connect to what binds `endpoint`."""
    for everywhere in ("*", "0.0.0.0", "[::]"):
        endpoint = endpoint.replace(f"//{everywhere}:", "//127.0.0.1:")
    return endpoint


def engine_endpoints(vllm_config: VllmConfig, rank: int) -> Endpoints | None:
    """Endpoints of this engine's consolidator; None if there is to be none.

    vLLM keeps what it published for who missed some only if it has a replay endpoint. If it is
    given none, it gets one inside the process, before it makes its publisher.
    """
    from kvbm.events.zmq_consolidator import Endpoints

    additional = getattr(vllm_config, "additional_config", None)
    if isinstance(additional, Mapping) and "consolidator_endpoints" in additional:
        found = additional["consolidator_endpoints"]
    else:
        found = get_consolidator_endpoints(vllm_config)
    if found is None:
        return None
    events = vllm_config.kv_events_config
    if events.replay_endpoint is None:
        events.replay_endpoint = f"inproc://kvbm-replay-{vllm_config.kv_transfer_config.engine_id}"
    engine = ZmqEventPublisher.offset_endpoint_port(found[0], rank)
    replay = ZmqEventPublisher.offset_endpoint_port(events.replay_endpoint, rank)
    output = ports_above(found[1], rank)
    return Endpoints(
        engine=engine,
        output=output,
        replay=ports_above(output, REPLAY_PORTS_ABOVE),
        engine_replay=_to_connect_to(replay),
        topic=events.topic,
    )


def start_events(
    vllm_config: VllmConfig,
    settings: Settings,
    instance: str,
    groups: int,
    own_hashes: bool,
    disk_is_open: Callable[[], bool],
) -> Consolidator | None:
    """Start the engine's consolidator, if there is to be one and it can be.

    Parameters
    ----------
    vllm_config, settings
        The configuration.
    instance : str
        Whose tiers it tells of.
    groups : int
        KV-cache groups.
    own_hashes : bool
        Whether blocks are identified by hashes of our own instead of vLLM's.
    disk_is_open : callable
        Whether the leader has opened the disk tier.
    """
    reason = why_not(vllm_config, settings)
    if reason is not None:
        logger.debug("KV events are not consolidated: %s", reason)
        return None
    return if_possible(
        lambda: _start(vllm_config, settings, instance, groups, own_hashes, disk_is_open)
    )


def _start(
    vllm_config: VllmConfig,
    settings: Settings,
    instance: str,
    groups: int,
    own_hashes: bool,
    disk_is_open: Callable[[], bool],
) -> Consolidator | None:
    from kvbm.events.table_keys import ContentKeys, EngineKeys
    from kvbm.events.table_source import table_sources
    from kvbm.events.zmq_consolidator import Consolidator, start_consolidator

    rank = data_parallel_rank(vllm_config.parallel_config)
    endpoints = engine_endpoints(vllm_config, rank)
    if endpoints is None:
        return None

    def make() -> Consolidator:
        return Consolidator(
            endpoints,
            table_sources(instance, disk_is_open),
            ContentKeys() if own_hashes else EngineKeys(),
            settings.kv_events_consolidator_mode,
            groups,
            rank,
        )

    return start_consolidator(make, endpoints.output, "DYN_KVBM_LEADER_ZMQ_PUB_PORT")


def data_parallel_rank(parallel: Any) -> int:
    """Number of this engine among those that vLLM runs side by side.

    Where they are independent, as for dense models, their `data_parallel_rank` is 0.
    """
    index = getattr(parallel, "data_parallel_index", None)
    return int(parallel.data_parallel_rank if index is None else index)
