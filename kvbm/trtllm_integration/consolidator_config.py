# SPDX-License-Identifier: Apache-2.0
"""Whether and where an engine's KV events are consolidated, with TensorRT-LLM.

TensorRT-LLM publishes no events over ZMQ itself: `dynamo.trtllm` does, at a port of its choice. It
calls the first two functions, which are upstream's, to learn where. The connector, which has no
other way to learn the port, reads it from `DYN_KVBM_TRTLLM_ZMQ_PORT`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from kvbm.config import Settings, load_settings
from kvbm.events.endpoints import (
    OUTPUT_PORTS_ABOVE,
    REPLAY_PORTS_ABOVE,
    checked_port,
    if_possible,
)
from kvbm.utils import get_consolidator_mode, is_truthy

if TYPE_CHECKING:
    from kvbm.events.zmq_consolidator import Consolidator

__all__ = [
    "get_consolidator_endpoints",
    "get_consolidator_mode",
    "is_truthy",
    "should_enable_consolidator",
    "start_events",
]

logger = logging.getLogger(__name__)

CONNECTOR_MODULE = "kvbm.trtllm_integration.connector"
CONNECTOR_PRESET = "kvbm"


def should_enable_consolidator(arg_map: Any) -> bool:
    """Whether these engine arguments have our connector, and nobody says no.

    Parameters
    ----------
    arg_map : dict
        TensorRT-LLM's engine arguments.
    """
    if not load_settings().kv_events_enable_consolidator:
        logger.info("KV events are not consolidated: DYN_KVBM_KV_EVENTS_ENABLE_CONSOLIDATOR")
        return False
    connector = arg_map.get("kv_connector_config") if isinstance(arg_map, Mapping) else None
    if not _is_ours(connector):
        logger.warning("KV events are not consolidated: the connector is not %s", CONNECTOR_MODULE)
        return False
    return True


def _is_ours(connector: Any) -> bool:
    if isinstance(connector, Mapping):
        module, preset = connector.get("connector_module"), connector.get("connector")
    else:
        module = getattr(connector, "connector_module", None)
        preset = getattr(connector, "connector", None)
    return CONNECTOR_MODULE in (module or "") or preset == CONNECTOR_PRESET


def get_consolidator_endpoints() -> tuple[str, str, str]:
    """Endpoints of the engine's publisher and of the consolidator's output.

    Returns
    -------
    tuple of str
        The engine's publisher, to be bound; the output, to be bound; the output, to connect to.

    Raises
    ------
    ValueError
        The output's port would be above 65535.
    """
    settings = load_settings()
    engine = settings.trtllm_zmq_port or settings.leader_zmq_pub_port
    port = checked_port(settings.leader_zmq_pub_port + OUTPUT_PORTS_ABOVE)
    return f"tcp://*:{engine}", f"tcp://0.0.0.0:{port}", f"tcp://127.0.0.1:{port}"


def start_events(
    settings: Settings, instance: str, disk_is_open: Callable[[], bool]
) -> Consolidator | None:
    """Start the engine's consolidator, if there is to be one and it can be.

    Parameters
    ----------
    settings : Settings
        Whether it is wanted, and its ports.
    instance : str
        Whose tiers it tells of.
    disk_is_open : callable
        Whether the leader has opened the disk tier.
    """
    if not settings.kv_events_enable_consolidator:
        return None
    if settings.trtllm_zmq_port is None:
        logger.info(
            "KV events are not consolidated: DYN_KVBM_TRTLLM_ZMQ_PORT, the port at which "
            "TensorRT-LLM's events are published, is not set"
        )
        return None
    return if_possible(lambda: _start(settings, instance, disk_is_open))


def _start(
    settings: Settings, instance: str, disk_is_open: Callable[[], bool]
) -> Consolidator | None:
    from kvbm.events.table_keys import ContentKeys
    from kvbm.events.table_source import table_sources
    from kvbm.events.zmq_consolidator import Consolidator, Endpoints, start_consolidator

    port = checked_port(settings.leader_zmq_pub_port + OUTPUT_PORTS_ABOVE)
    endpoints = Endpoints(
        engine=f"tcp://127.0.0.1:{settings.trtllm_zmq_port}",
        output=f"tcp://0.0.0.0:{port}",
        replay=f"tcp://0.0.0.0:{checked_port(port + REPLAY_PORTS_ABOVE)}",
    )

    def make() -> Consolidator:
        return Consolidator(
            endpoints,
            table_sources(instance, disk_is_open),
            ContentKeys(),
            settings.kv_events_consolidator_mode,
        )

    return start_consolidator(make, endpoints.output, "DYN_KVBM_LEADER_ZMQ_PUB_PORT")
