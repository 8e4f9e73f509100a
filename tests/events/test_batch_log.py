# SPDX-License-Identifier: Apache-2.0
"""Numbers of batches: no gap, no duplicate, and above those of an earlier start."""

from __future__ import annotations

import json

import pytest

from kvbm.events.batch_log import BATCH_EVENTS, KEPT_BATCHES, BatchLog, Message
from kvbm.events.model import Batch, Cleared, Event, Removed


def encode(batch: Batch) -> bytes:
    """Readable payloads: the removed hashes, and the rank."""
    found = [e.block_hashes[0] if isinstance(e, Removed) else "cleared" for e in batch.events]
    return json.dumps([found, batch.rank]).encode()


def removed(*values: int) -> list[Event]:
    """An event for each value."""
    return [Removed((value,)) for value in values]


def test_batches_are_numbered_one_after_the_other() -> None:
    log = BatchLog(encode, rank=3, first=7)
    assert log.commit(removed(1, 2)) == [Message(7, b"[[1, 2], 3]")]
    assert log.commit(removed(4)) == [Message(8, b"[[4], 3]")]
    assert log.next == 9


def test_nothing_is_no_batch() -> None:
    log = BatchLog(encode, first=7)
    assert log.commit([]) == []
    assert log.next == 7


def test_many_events_become_several_batches() -> None:
    log = BatchLog(encode, first=0)
    messages = log.commit(removed(*range(BATCH_EVENTS + 1)))
    assert [message.number for message in messages] == [0, 1]
    sent = [value for m in messages for value in json.loads(m.payload)[0]]
    assert sent == list(range(BATCH_EVENTS + 1))


def test_what_was_missed_is_there_from_any_number_that_is_kept() -> None:
    log = BatchLog(encode, first=5)
    sent = [message for value in range(4) for message in log.commit(removed(value))]
    for number in range(5, 9):
        assert log.since(number) == sent[number - 5 :]
    assert log.since(9) == []


@pytest.mark.parametrize("number", [0, 4, 10, 2**63])
def test_what_was_never_sent_is_not_there(number: int) -> None:
    log = BatchLog(encode, first=5)
    for value in range(4):
        log.commit(removed(value))
    assert log.since(number) is None


def test_what_is_no_longer_kept_is_not_there() -> None:
    log = BatchLog(encode, first=0)
    for value in range(KEPT_BATCHES + 3):
        log.commit(removed(value))
    assert log.since(2) is None
    kept = log.since(3)
    assert kept is not None
    assert len(kept) == KEPT_BATCHES


def test_a_snapshot_has_the_number_of_the_last_batch_in_it() -> None:
    log = BatchLog(encode, first=5)
    log.commit(removed(1))
    messages = list(log.snapshot(iter([Cleared(), *removed(*range(BATCH_EVENTS))])))
    assert [message.number for message in messages] == [5, 5]
    assert log.next == 6


def test_a_log_begins_above_one_that_began_before() -> None:
    first = BatchLog(encode)
    for value in range(3):
        first.commit(removed(value))
    assert BatchLog(encode).next > first.next
