# SPDX-License-Identifier: Apache-2.0
"""The sockets of a publisher: frames as upstream's, answers as vLLM's, snapshots where none is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

zmq = pytest.importorskip("zmq")

from kvbm.events.model import Cleared, Stored  # noqa: E402
from kvbm.events.msgspec_wire import decode_batch  # noqa: E402
from kvbm.events.zmq_publisher import END, BatchPublisher  # noqa: E402
from tests.events.sockets import ANYWHERE, DEADLINE_S, Publisher  # noqa: E402
from tests.leaks import wait_until  # noqa: E402


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    """A publisher whose first batch has the number 5."""
    with closing(Publisher(first=5)) as made:
        yield made


@pytest.fixture
def asker(publisher: Publisher) -> Iterator[Any]:
    """A socket that gets answers of several messages."""
    socket = zmq.Context.instance().socket(zmq.DEALER)
    socket.linger = 0
    socket.connect(publisher.sockets.replay_endpoint)
    yield socket
    socket.close()


def ask(publisher: Publisher, asker: Any, frames: list[bytes]) -> list[list[bytes]]:
    """Send a request; the answer up to its end."""
    found: list[list[bytes]] = []
    asker.send_multipart(frames)

    def ended() -> bool:
        publisher.answer()
        while asker.poll(1):
            found.append(asker.recv_multipart())
        return bool(found) and found[-1][-2] == END

    assert wait_until(ended, DEADLINE_S)
    return found


def test_a_message_has_topic_number_and_payload(publisher: Publisher) -> None:
    socket = zmq.Context.instance().socket(zmq.SUB)
    socket.subscribe(b"")
    socket.connect(publisher.sockets.endpoint)
    found: list[list[bytes]] = []

    def heard() -> bool:
        publisher.change({1})
        if socket.poll(10):
            found.append(socket.recv_multipart())
        return bool(found)

    try:
        assert wait_until(heard, DEADLINE_S)
    finally:
        socket.close(linger=0)
    topic, number, payload = found[0]
    assert (topic, len(number)) == (b"", 8)
    assert 5 <= int.from_bytes(number, "big") < publisher.log.next
    assert decode_batch(payload).events == (Stored(1, None, (1,), medium="GPU"),)


def test_an_answer_is_what_was_missed_and_an_end(publisher: Publisher, asker: Any) -> None:
    for value in range(3):
        publisher.change({value})
    *batches, end = ask(publisher, asker, [b"", (6).to_bytes(8, "big")])
    assert [int.from_bytes(frames[2], "big") for frames in batches] == [6, 7]
    assert [frames[:2] for frames in batches] == [[b"", b""]] * 2
    assert end == [b"", b"", END, b""]


def test_who_missed_nothing_gets_an_end(publisher: Publisher, asker: Any) -> None:
    publisher.change({1})
    assert ask(publisher, asker, [b"", (6).to_bytes(8, "big")]) == [[b"", b"", END, b""]]


@pytest.mark.parametrize("number", [0, 4, 8, 2**64 - 1])
def test_who_asks_for_what_is_not_kept_gets_a_snapshot(
    publisher: Publisher, asker: Any, number: int
) -> None:
    publisher.change({1, 2})
    publisher.change({3}, {1})
    (snapshot, _) = ask(publisher, asker, [b"", number.to_bytes(8, "big")])
    assert int.from_bytes(snapshot[2], "big") == 6
    first, *stored = decode_batch(snapshot[3]).events
    assert first == Cleared()
    assert [event.block_hash for event in stored if isinstance(event, Stored)] == [2, 3]


@pytest.mark.parametrize("frames", [[b""], [b"x", bytes(8)], [b"", bytes(7)], [b"", b"", bytes(8)]])
def test_a_request_that_is_none_is_not_answered(
    publisher: Publisher, asker: Any, frames: list[bytes]
) -> None:
    asker.send_multipart(frames)
    assert ask(publisher, asker, [b"", (5).to_bytes(8, "big")]) == [[b"", b"", END, b""]]


def test_an_asker_that_is_gone_hurts_nobody(publisher: Publisher, asker: Any) -> None:
    gone = zmq.Context.instance().socket(zmq.DEALER)
    gone.connect(publisher.sockets.replay_endpoint)
    gone.send_multipart([b"", bytes(8)])
    gone.close(linger=1000)
    publisher.change({1})
    assert len(ask(publisher, asker, [b"", (5).to_bytes(8, "big")])) == 2


def test_a_port_in_use_is_an_os_error(publisher: Publisher) -> None:
    with pytest.raises(OSError, match="in use"):
        BatchPublisher(publisher.log, publisher.sockets.endpoint, ANYWHERE)
