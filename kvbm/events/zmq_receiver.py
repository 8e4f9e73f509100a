# SPDX-License-Identifier: Apache-2.0
"""Batches of a publisher, in their order, without a gap and without a duplicate.

For both sides of the consolidator: it hears an engine with this, and a router may hear it. Batches
come by subscription. A number that is missing, and once a second the question whether one is, sends
a request to the publisher's replay socket (`kvbm.events.zmq_publisher`; vLLM's has the same
protocol, but no snapshots). What comes meanwhile waits. Nothing here blocks but `receive`.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import Any

import zmq

from kvbm.events.batch_log import Message
from kvbm.events.model import Batch, Cleared
from kvbm.events.msgspec_wire import decode_batch
from kvbm.events.zmq_publisher import END, SEND_MESSAGES_MAX

logger = logging.getLogger(__name__)

ASK_SECS = 1.0
"""Time without a batch after which the publisher is asked whether one was lost."""
ANSWER_SECS = 5.0
"""Time after which a request is taken for lost."""
RECONNECT_MS = 20
DRAIN_MAX = 10_000
"""Messages that are read in one go."""


class BatchReceiver:
    """Receives what one publisher sends; used by one thread.

    Parameters
    ----------
    endpoint : str
        The publisher's.
    replay_endpoint : str, optional
        Its replay socket; without it, what is lost is lost, and counted.
    expected : int, optional
        Number of the publisher's very first batch; None: begin with a snapshot.
    topic : str
        The publisher's.

    Attributes
    ----------
    lost : int
        Batches that were missed for good.
    """

    def __init__(
        self,
        endpoint: str,
        replay_endpoint: str | None = None,
        expected: int | None = None,
        topic: str = "",
    ) -> None:
        self.lost = 0
        self.expected = expected
        self._replay_endpoint = replay_endpoint
        self._context = zmq.Context.instance()
        self._in = self._context.socket(zmq.SUB)
        self._in.set_hwm(SEND_MESSAGES_MAX)
        self._in.reconnect_ivl = RECONNECT_MS
        self._in.subscribe(topic)
        self._in.connect(endpoint)
        self._asking: Any = None
        self._asked_at: float | None = None  # None: nothing is asked
        self._heard_at = 0.0
        self._answer: list[Message] = []
        self._waiting: deque[Message] = deque(maxlen=SEND_MESSAGES_MAX)
        self._batches: list[Batch] = []

    @property
    def sockets(self) -> list[Any]:
        """Sockets that become readable when there is something to receive."""
        return [self._in] if self._asking is None else [self._in, self._asking]

    def receive(self, timeout_secs: float = 0.0) -> list[Batch]:
        """Batches that have come, in order; waits for the first readable socket at most so long."""
        self._ask_if_due()
        if timeout_secs > 0:
            poller = zmq.Poller()
            for socket in self.sockets:
                poller.register(socket, zmq.POLLIN)
            poller.poll(timeout_secs * 1000)
        for frames in _drain(self._in):
            if 2 <= len(frames) <= 3:
                self._published(frames)
            else:
                logger.warning("a message of %d frames is no batch of events", len(frames))
        if self._asking is not None:
            for frames in _drain(self._asking):
                self._answered(frames)
        batches, self._batches = self._batches, []
        return batches

    # ---- what comes ------------------------------------------------------------------------------
    def _published(self, frames: list[bytes]) -> None:
        if len(frames) == 2:  # without a number there is no order to keep
            self._decode(frames[1])
            return
        message = Message(int.from_bytes(frames[1], "big"), frames[2])
        if self._asked_at is not None:
            self._waiting.append(message)
        elif self.expected is None or message.number > self.expected:
            if self._replay_endpoint is None:
                self._accept(message)
            else:
                self._waiting.append(message)
                self._ask()
        else:
            self._accept(message)

    def _accept(self, message: Message) -> None:
        if self.expected is not None and message.number < self.expected:
            return  # it was in an answer already
        if self.expected is not None and message.number > self.expected:
            missing = message.number - self.expected
            self.lost += missing
            logger.warning("%d batches of events are lost for good", missing)
        self.expected = message.number + 1
        self._heard_at = time.monotonic()
        self._decode(message.payload)

    def _decode(self, payload: bytes) -> Batch | None:
        try:
            batch = decode_batch(payload)
        except ValueError as error:
            logger.warning("a batch of events is left out: %s", error)
            return None
        for problem in batch.problems:
            logger.warning("an event is left out: %s", problem)
        self._batches.append(batch)
        return batch

    # ---- what is asked for -----------------------------------------------------------------------
    def _ask_if_due(self) -> None:
        if self._replay_endpoint is None:
            return
        now = time.monotonic()
        if self._asked_at is not None:
            if now - self._asked_at > ANSWER_SECS:
                self._stop_asking()
        elif now - self._heard_at > ASK_SECS:
            self._ask()

    def _ask(self) -> None:
        if self._asking is None:
            self._asking = self._context.socket(zmq.DEALER)
            self._asking.set_hwm(0)
            self._asking.linger = 0
            self._asking.reconnect_ivl = RECONNECT_MS
            self._asking.connect(self._replay_endpoint)
        self._asked_at = time.monotonic()
        self._asking.send_multipart([b"", (self.expected or 0).to_bytes(8, "big")])

    def _stop_asking(self) -> None:
        """Give a request up, and with it what may still come of its answer."""
        self._asking.close()
        self._asking = self._asked_at = None
        self._answer.clear()
        while self._waiting and self._waiting[0].number == self.expected:  # nothing was missing
            self._accept(self._waiting.popleft())

    def _answered(self, frames: list[bytes]) -> None:
        number, payload = frames[-2:]
        if number != END:
            self._answer.append(Message(int.from_bytes(number, "big"), payload))
            return
        self._asked_at, self._heard_at = None, time.monotonic()
        answer, self._answer = self._answer, []
        if answer and answer[0].number != self.expected and _is_snapshot(answer[0]):
            for message in answer:
                self._decode(message.payload)
            self.expected = answer[-1].number + 1
            answer = []
        for message in answer:
            self._accept(message)
        while self._waiting:
            self._accept(self._waiting.popleft())

    def close(self) -> None:
        """Close the sockets."""
        self._in.close(linger=0)
        if self._asking is not None:
            self._asking.close(linger=0)


def _drain(socket: Any) -> list[list[bytes]]:
    """Messages that are there."""
    found: list[list[bytes]] = []
    while len(found) < DRAIN_MAX:
        try:
            found.append(socket.recv_multipart(zmq.NOBLOCK))
        except zmq.Again:
            break
    return found


def _is_snapshot(message: Message) -> bool:
    try:
        events = decode_batch(message.payload).events
    except ValueError:
        return False
    return bool(events) and isinstance(events[0], Cleared)
