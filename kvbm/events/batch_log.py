# SPDX-License-Identifier: Apache-2.0
"""Numbered batches, the last of them kept for subscribers that missed some.

A batch is a commit to the consolidated index, and its number is that of all its events. Numbers
begin at the time of the start, in microseconds since 1970, and go up by one: those of a publisher
that was started again are above all that were used before, so a subscriber that noticed nothing
of it sees a gap.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from kvbm.events.model import Batch, Event

KEPT_BATCHES = 1000
"""Batches that are kept; with one in 50 ms, 50 s."""
BATCH_EVENTS = 4096
"""Events in a batch; more become several."""


class Message(NamedTuple):
    """A batch as it is sent."""

    number: int
    payload: bytes


class BatchLog:
    """Numbers batches and keeps the last ones.

    Parameters
    ----------
    encode : callable
        Makes the payload of a batch.
    rank : int
        Data-parallel rank of the engine.
    first : int, optional
        Number of the first batch.
    """

    def __init__(
        self, encode: Callable[[Batch], bytes], rank: int = 0, first: int | None = None
    ) -> None:
        self._encode = encode
        self._rank = rank
        self.next = time.time_ns() // 1000 if first is None else first
        self._kept: deque[Message] = deque(maxlen=KEPT_BATCHES)

    def commit(self, events: Sequence[Event]) -> list[Message]:
        """Number events, and return what is to be sent."""
        messages = []
        for payload in self._payloads(iter(events)):
            messages.append(Message(self.next, payload))
            self.next += 1
        self._kept += messages
        return messages

    def since(self, number: int) -> list[Message] | None:
        """Batches from this number on; None if they are not all there."""
        if number == self.next:
            return []
        if not self._kept or not self._kept[0].number <= number < self.next:
            return None
        return list(islice(self._kept, number - self._kept[0].number, None))

    def snapshot(self, events: Iterator[Event]) -> Iterator[Message]:
        """A snapshot as batches, under the number of the last commit that it has in it."""
        return (Message(self.next - 1, payload) for payload in self._payloads(events))

    def _payloads(self, events: Iterator[Event]) -> Iterator[bytes]:
        while chunk := tuple(islice(events, BATCH_EVENTS)):
            yield self._encode(Batch(time.time(), chunk, self._rank))
