# SPDX-License-Identifier: Apache-2.0
"""A publisher in this process, and subscribers that die; all answered by hand, without threads."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

from kvbm.events.batch_log import BatchLog
from kvbm.events.index import EventIndex
from kvbm.events.model import Cleared, Event, Removed, Stored, Tier
from kvbm.events.msgspec_wire import encode_batch
from kvbm.events.zmq_publisher import BatchPublisher
from kvbm.events.zmq_receiver import BatchReceiver
from tests.leaks import wait_until
from tests.metrics.scrape import free_port

ANYWHERE = "tcp://127.0.0.1:*"
DEADLINE_S = 20.0


def free_base_port(ranks: int = 1, above: Sequence[int] = (1000, 2000)) -> int:
    """A port of which those so much above it are free, one a rank."""
    while True:
        port = free_port() % 30_000 + 10_000
        try:
            with ExitStack() as stack:
                for free in (port + base + rank for base in above for rank in range(ranks)):
                    stack.enter_context(socket.socket()).bind(("0.0.0.0", free))
        except OSError:
            continue
        return port


class Publisher:
    """What a consolidator does with its sockets, and what it has told."""

    def __init__(self, first: int | None = None) -> None:
        self.log = BatchLog(encode_batch, first=first)
        self.sockets = BatchPublisher(self.log, ANYWHERE, ANYWHERE)
        self.blocks: set[int] = set()

    def change(self, added: Iterator[int] | set[int], removed: set[int] | None = None) -> None:
        """Publish blocks that came and went, in one batch."""
        removed = removed or set()
        events: list[Event] = [Stored(value, None, (value,), medium="GPU") for value in added]
        if removed:
            events.append(Removed(tuple(removed), "GPU"))
        self.blocks = (self.blocks | set(added)) - removed
        self.sockets.publish(events)

    def snapshot(self) -> Iterator[Event]:
        """What was told and holds."""
        yield Cleared()
        for value in sorted(self.blocks):
            yield Stored(value, None, (value,), medium="GPU")

    def answer(self) -> None:
        """Answer what was asked."""
        self.sockets.answer(self.snapshot)

    def close(self) -> None:
        """Close the sockets."""
        self.sockets.close()


class Subscriber:
    """A receiver and its index."""

    def __init__(
        self, publisher: Publisher, replay: bool = True, expected: int | None = None
    ) -> None:
        sockets = publisher.sockets
        self.publisher = publisher
        self.index = EventIndex()
        self.receiver = BatchReceiver(
            sockets.endpoint, sockets.replay_endpoint if replay else None, expected
        )

    def hear(self, timeout_secs: float = 0.005) -> None:
        """Receive once, and answer what was asked."""
        self.publisher.answer()
        for batch in self.receiver.receive(timeout_secs):
            self.index.apply(batch)

    def hear_until(self, condition: Callable[[], bool]) -> bool:
        """Hear until a condition holds; False if that takes too long."""

        def holds() -> bool:
            self.hear()
            return condition()

        return wait_until(holds, DEADLINE_S)

    def agrees(self) -> bool:
        """Whether the index becomes what the publisher has told."""
        return self.hear_until(
            lambda: self.index.blocks == dict.fromkeys(self.publisher.blocks, int(Tier.DEVICE))
        )

    def close(self) -> None:
        """Close the sockets."""
        self.receiver.close()
