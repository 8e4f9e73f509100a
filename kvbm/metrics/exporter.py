# SPDX-License-Identifier: Apache-2.0
"""The HTTP end point: `/metrics` on a port of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from prometheus_client import CollectorRegistry, start_http_server

from kvbm.metrics.collector import HitRates, InstanceCollector
from kvbm.metrics.device import DeviceReader

logger = logging.getLogger(__name__)

ADDRESS = "0.0.0.0"
"""As upstream: a Prometheus server is usually on another machine."""


class Exporter:
    """Serves metrics until it is closed.

    Parameters
    ----------
    instances : callable
        Names of the instances to show.
    port : int
        0: one that is free.
    hit_rates : callable, optional
        As in `InstanceCollector`.
    address : str
        Where to listen.
    disk_folder : Path, optional
        Folder of the disk tiers; by default that of `DYN_KVBM_DISK_CACHE_DIR`.

    Raises
    ------
    OSError
        The port is in use.
    """

    def __init__(
        self,
        instances: Callable[[], Iterable[str]],
        port: int,
        hit_rates: HitRates | None = None,
        address: str = ADDRESS,
        disk_folder: Path | None = None,
    ) -> None:
        registry = CollectorRegistry(auto_describe=False)
        self._collector = InstanceCollector(instances, hit_rates, DeviceReader(disk_folder))
        registry.register(self._collector)
        self._server, self._thread = start_http_server(port, address, registry)
        self.port = int(self._server.server_port)

    def close(self) -> None:
        """Stop serving; may be called twice."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._collector.close()


def start_exporter(
    instance: str, port: int, hit_rates: HitRates, disk_folder: Path | None = None
) -> Exporter | None:
    """Serve an engine's metrics; a port in use is a line in the log, and no metrics."""
    try:
        exporter = Exporter(lambda: [instance], port, hit_rates, disk_folder=disk_folder)
    except OSError as error:
        logger.warning(
            "no metrics on port %d (%s): the engine goes on without. Another engine on this host "
            "needs another DYN_KVBM_METRICS_PORT; for one that serves all instances, run "
            "`python -m kvbm.metrics`",
            port,
            error.strerror or error,
        )
        return None
    logger.info("metrics are served on port %d", exporter.port)
    return exporter
