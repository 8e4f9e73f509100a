# SPDX-License-Identifier: Apache-2.0
"""The sockets of a publisher: batches go out on one, what was missed is asked for on another.

The second speaks vLLM's replay protocol: a request is an empty frame and the number of the first
batch that is wanted, 8 bytes big-endian; the answer is one message a batch and one with the number
-1 and no payload. Where that batch is not kept any more, or was never sent, the answer is a
snapshot: a batch that begins with `AllBlocksCleared`, and perhaps more, all under the number of
the last batch that they replace.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator

import zmq

from kvbm.events.batch_log import BatchLog, Message
from kvbm.events.model import Event

logger = logging.getLogger(__name__)

END = b"\xff" * 8
SEND_MESSAGES_MAX = 100_000
"""Messages that wait for one subscriber before it loses some; as vLLM's default."""


class BatchPublisher:
    """Publishes the batches of a log; used by one thread.

    Parameters
    ----------
    log : BatchLog
        Numbers and keeps the batches.
    endpoint, replay_endpoint : str
        Where to bind; a port of 0 is one that is free.

    Raises
    ------
    OSError
        An endpoint is in use, or none.
    """

    def __init__(self, log: BatchLog, endpoint: str, replay_endpoint: str) -> None:
        self._log = log
        context = zmq.Context.instance()
        self._out = context.socket(zmq.PUB)
        self.requests = context.socket(zmq.ROUTER)
        try:
            for socket, where in ((self._out, endpoint), (self.requests, replay_endpoint)):
                socket.set_hwm(SEND_MESSAGES_MAX)
                socket.linger = 0
                socket.bind(where)
            # Else an answer would lose messages in its middle where the asker does not read.
            self.requests.router_mandatory = True
        except zmq.ZMQError as error:
            self.close()
            raise OSError(error.errno, f"{endpoint}, {replay_endpoint}: {error}") from None
        self.endpoint: str = self._out.getsockopt_string(zmq.LAST_ENDPOINT)
        self.replay_endpoint: str = self.requests.getsockopt_string(zmq.LAST_ENDPOINT)

    def publish(self, events: Iterable[Event]) -> None:
        """Commit events, and send them."""
        for message in self._log.commit(list(events)):
            self._out.send_multipart(_frames(message))

    def answer(self, snapshot: Callable[[], Iterator[Event]]) -> None:
        """Answer the requests that are there; `snapshot` says what was published and holds."""
        while True:
            try:
                asker, *request = self.requests.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(request) != 2 or request[0] != b"" or len(request[1]) != 8:
                continue
            missed = self._log.since(int.from_bytes(request[1], "big"))
            answer = self._log.snapshot(snapshot()) if missed is None else missed
            # An asker that is gone or does not read gets no end, and so asks again if it lives.
            with contextlib.suppress(zmq.ZMQError):
                for message in answer:
                    self._reply([asker, b"", *_frames(message)])
                self._reply([asker, b"", b"", END, b""])

    def _reply(self, frames: list[bytes]) -> None:
        self.requests.send_multipart(frames, zmq.NOBLOCK)

    def close(self) -> None:
        """Close the sockets; what was not sent is lost."""
        self._out.close()
        self.requests.close()


def _frames(message: Message) -> list[bytes]:
    """The topic, which is empty, the number and the payload."""
    return [b"", message.number.to_bytes(8, "big"), message.payload]
