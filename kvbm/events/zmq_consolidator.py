# SPDX-License-Identifier: Apache-2.0
"""The thread that joins the engine's events with what happens in the tiers, and publishes both."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import zmq

from kvbm.events.batch_log import BatchLog
from kvbm.events.msgspec_wire import encode_batch
from kvbm.events.table_keys import TableKeys
from kvbm.events.table_source import TableSource
from kvbm.events.tracker import Mode, Tracker
from kvbm.events.zmq_publisher import BatchPublisher
from kvbm.events.zmq_receiver import BatchReceiver

logger = logging.getLogger(__name__)

FLUSH_SECS = 0.05
"""How often what has changed is published, as upstream."""
JOIN_SECS = 10.0


@dataclass(frozen=True)
class Endpoints:
    """Where a consolidator hears and speaks.

    Attributes
    ----------
    engine, engine_replay : str, str or None
        The engine's publisher, and its replay socket if it has one.
    output, replay : str
        Where subscribers connect to; these are bound.
    topic : str
        The engine's.
    """

    engine: str
    output: str
    replay: str
    engine_replay: str | None = None
    topic: str = ""


class Consolidator:
    """One engine's stream of events, until it is closed.

    Parameters
    ----------
    endpoints : Endpoints
        Where it hears and speaks.
    tables : sequence of TableSource
        The tiers; closed with it.
    keys : TableKeys
        How the engine's blocks are found in the tables.
    mode : {"dedup", "passthrough"}
        See `kvbm.events.tracker`.
    groups, rank : int
        KV-cache groups, and the data-parallel rank of the engine.

    Attributes
    ----------
    endpoint, replay_endpoint : str
        Where subscribers connect to.

    Raises
    ------
    OSError
        An output endpoint is in use.
    """

    def __init__(
        self,
        endpoints: Endpoints,
        tables: Sequence[TableSource],
        keys: TableKeys,
        mode: Mode = "dedup",
        groups: int = 1,
        rank: int = 0,
    ) -> None:
        self._tables = tables
        self._tracker = Tracker(keys, mode, groups)
        self._publisher = BatchPublisher(
            BatchLog(encode_batch, rank), endpoints.output, endpoints.replay
        )
        self.endpoint = self._publisher.endpoint
        self.replay_endpoint = self._publisher.replay_endpoint
        try:
            self._engine = BatchReceiver(
                endpoints.engine, endpoints.engine_replay, expected=0, topic=endpoints.topic
            )
        except zmq.ZMQError:
            self._publisher.close()
            raise
        self._closing = threading.Event()
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name="kvbm-events", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with ExitStack() as ends:
                ends.callback(self._publisher.close)
                ends.callback(self._engine.close)
                for table in self._tables:
                    ends.callback(table.close)
                while not self._closing.is_set():
                    self._wait(time.monotonic() + FLUSH_SECS)
                    self._publish()
        except Exception:
            logger.exception("KV events are not published any more")

    def _wait(self, until: float) -> None:
        """Hear the engine and answer subscribers until it is time to publish."""
        while (left := until - time.monotonic()) > 0:
            poller = zmq.Poller()
            for socket in (*self._engine.sockets, self._publisher.requests):
                poller.register(socket, zmq.POLLIN)
            poller.poll(left * 1000)
            self._hear()
            self._publisher.answer(self._tracker.snapshot)

    def _hear(self) -> None:
        for batch in self._engine.receive():
            for event in batch.events:
                self._tracker.device(event)

    def _publish(self) -> None:
        """Publish what has changed.

        The engine is heard before the tables are looked at: what it says is gone from the device
        was in a table by then, if it came there at all.
        """
        self._hear()
        for table in self._tables:
            delta = table.delta()
            self._tracker.table(table.tier, delta.added, delta.removed)
        events = self._tracker.flush()
        if events:
            self._publisher.publish(events)

    def expect_reuse(self) -> None:
        """Be told that the engine also tells of blocks that were there already."""
        self._tracker.reuse_is_told = True

    def close(self) -> None:
        """End the thread, which closes what it uses; may be called twice."""
        self._closing.set()
        if self._pid == os.getpid():
            self._thread.join(JOIN_SECS)


def start_consolidator(
    make: Callable[[], Consolidator], output: str, setting: str
) -> Consolidator | None:
    """Start one; where its ports are in use the engine goes on without, and a line says so."""
    try:
        consolidator = make()
    except OSError as error:
        logger.warning(
            "no KV events at %s (%s): the engine goes on without. Another engine on this host "
            "needs another %s",
            output,
            error.strerror or error,
            setting,
        )
        return None
    logger.info(
        "KV events are published at %s, replayed at %s",
        consolidator.endpoint,
        consolidator.replay_endpoint,
    )
    return consolidator
