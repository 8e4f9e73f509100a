# SPDX-License-Identifier: Apache-2.0
"""Ports of an engine's stream of events, and starting it or going on without."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

__all__ = [
    "OUTPUT_PORTS_ABOVE",
    "PORT_MAX",
    "REPLAY_PORTS_ABOVE",
    "checked_port",
    "if_possible",
    "ports_above",
]

logger = logging.getLogger(__name__)

OUTPUT_PORTS_ABOVE = 1000
"""Subscribers connect that many ports above `DYN_KVBM_LEADER_ZMQ_PUB_PORT`, as upstream."""
REPLAY_PORTS_ABOVE = 1000
"""The replay socket is that many ports above the output."""
PORT_MAX = 65535

Started = TypeVar("Started")


def checked_port(port: int) -> int:
    """Return the port.

    Raises
    ------
    ValueError
        It is above 65535.
    """
    if port > PORT_MAX:
        raise ValueError(f"the KV events' port {port} is above {PORT_MAX}")
    return port


def ports_above(endpoint: str, count: int) -> str:
    """Return the endpoint that many ports above a TCP endpoint."""
    host, _, port = endpoint.rpartition(":")
    return f"{host}:{checked_port(int(port) + count)}"


def if_possible(start: Callable[[], Started | None]) -> Started | None:
    """Return what `start` does; if it fails the engine goes on without events, and a line says so.

    Parameters
    ----------
    start : callable
        Imports what it needs itself: the libraries may be missing.
    """
    try:
        return start()
    except ImportError as error:
        logger.error("no KV events: %s; pip install 'kvbm[events]'", error)
    except Exception:
        logger.exception("no KV events: the engine goes on without")
    return None
