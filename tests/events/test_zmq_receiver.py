# SPDX-License-Identifier: Apache-2.0
"""Batches arrive in order, each once, whatever is lost on the way and whoever is started again."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest

zmq = pytest.importorskip("zmq")

from kvbm.events import batch_log, zmq_receiver  # noqa: E402
from kvbm.events.model import Batch, Removed, Stored  # noqa: E402
from kvbm.events.msgspec_wire import encode_batch  # noqa: E402
from kvbm.events.zmq_publisher import END  # noqa: E402
from kvbm.events.zmq_receiver import BatchReceiver  # noqa: E402
from tests.events.sockets import Publisher, Subscriber  # noqa: E402
from tests.leaks import wait_until  # noqa: E402


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    """Closes at the end; questions are asked often."""
    monkeypatch.setattr(zmq_receiver, "ASK_SECS", 0.02)
    with ExitStack() as made:
        yield made


def frames(number: int, *events: Stored | Removed) -> list[bytes]:
    """A message as it is published."""
    return [b"", number.to_bytes(8, "big"), encode_batch(Batch(0.0, events))]


def test_a_late_subscriber_gets_what_was_before_it(stack: ExitStack) -> None:
    publisher = stack.enter_context(closing(Publisher()))
    publisher.change({1, 2, 3})
    publisher.change({4}, {1})
    subscriber = stack.enter_context(closing(Subscriber(publisher)))
    assert subscriber.agrees()
    publisher.change({5}, {2})
    assert subscriber.agrees()
    assert subscriber.receiver.lost == 0


def test_a_publisher_that_has_told_nothing_yet_has_an_empty_snapshot(stack: ExitStack) -> None:
    publisher = stack.enter_context(closing(Publisher()))
    subscriber = stack.enter_context(closing(Subscriber(publisher)))
    assert subscriber.hear_until(lambda: subscriber.receiver.expected == publisher.log.next)
    publisher.change({1})
    assert subscriber.agrees()


def test_what_is_lost_at_the_end_is_asked_for_in_silence(stack: ExitStack) -> None:
    publisher = stack.enter_context(closing(Publisher()))
    subscriber = stack.enter_context(closing(Subscriber(publisher)))
    assert subscriber.agrees()
    publisher.log.commit([Stored(9, None, (9,), medium="GPU")])  # numbered, but lost on the way
    publisher.blocks.add(9)
    assert subscriber.agrees()


def test_what_is_lost_in_the_middle_is_put_in_order(stack: ExitStack) -> None:
    publisher = stack.enter_context(closing(Publisher(first=0)))
    subscriber = stack.enter_context(closing(Subscriber(publisher, expected=0)))
    publisher.change({1})
    assert subscriber.agrees()
    for value in range(2, 6):
        publisher.log.commit([Stored(value, None, (value,), medium="GPU")])
        publisher.blocks.add(value)
    publisher.change(set(), {1, 3})  # of blocks whose beginning was lost
    assert subscriber.agrees()
    assert subscriber.receiver.expected == publisher.log.next


def test_a_batch_that_comes_twice_counts_once(stack: ExitStack) -> None:
    receiver = stack.enter_context(closing(BatchReceiver("inproc://nobody", expected=3)))
    for number in (3, 3, 4, 2, 4):
        receiver._published(frames(number, Stored(number, None, (1,))))
    assert [batch.events[0][0] for batch in receiver.receive()] == [3, 4]


def test_without_a_replay_socket_a_loss_is_counted(stack: ExitStack) -> None:
    receiver = stack.enter_context(closing(BatchReceiver("inproc://nobody", expected=0)))
    for number in (0, 4, 5, 7):
        receiver._published(frames(number, Stored(number, None, (1,))))
    assert [batch.events[0][0] for batch in receiver.receive()] == [0, 4, 5, 7]
    assert receiver.lost == 4


def test_a_replay_socket_that_kept_too_little_is_a_loss_too(stack: ExitStack) -> None:
    """As vLLM's, which has no snapshots."""
    receiver = stack.enter_context(closing(BatchReceiver("inproc://nobody", "inproc://no", 0)))
    receiver._published(frames(4, Stored(4, None, (1,))))
    assert receiver.receive() == []
    receiver._answered(frames(3, Stored(3, None, (1,))))
    receiver._answered(frames(4, Stored(4, None, (1,))))
    receiver._answered([b"", b"", END, b""])
    assert [batch.events[0][0] for batch in receiver.receive()] == [3, 4]
    assert receiver.lost == 3


def test_what_comes_while_an_answer_is_awaited_waits(stack: ExitStack) -> None:
    publisher = stack.enter_context(closing(Publisher(first=0)))
    subscriber = stack.enter_context(closing(Subscriber(publisher, expected=0)))
    publisher.change({1})
    assert subscriber.agrees()
    assert subscriber.hear_until(lambda: subscriber.receiver._asked_at is not None)
    publisher.change({2})
    assert subscriber.agrees()


def test_a_question_without_an_answer_is_asked_again(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zmq_receiver, "ANSWER_SECS", 0.05)
    publisher = stack.enter_context(closing(Publisher(first=0)))
    subscriber = stack.enter_context(closing(Subscriber(publisher, expected=0)))
    publisher.change({1})
    assert subscriber.agrees()
    publisher.sockets.requests.router_mandatory = False
    silent, publisher.answer = publisher.answer, lambda: None  # type: ignore[method-assign]
    assert subscriber.hear_until(lambda: subscriber.receiver._asked_at is not None)
    publisher.change({2})  # not held up by a question that nobody answers
    assert subscriber.agrees()
    publisher.answer = silent  # type: ignore[method-assign]
    publisher.change({3})
    assert subscriber.agrees()


def test_a_publisher_that_is_started_again_is_noticed(stack: ExitStack) -> None:
    first = stack.enter_context(closing(Publisher()))
    subscriber = stack.enter_context(closing(Subscriber(first)))
    first.change({1, 2})
    assert subscriber.agrees()
    endpoints = first.sockets.endpoint, first.sockets.replay_endpoint
    first.close()
    again = Publisher()
    again.close()

    def bound() -> bool:
        try:  # the port may be another socket's for a moment
            again.sockets = type(again.sockets)(again.log, *endpoints)
        except OSError:
            return False
        return True

    assert wait_until(bound)
    stack.enter_context(closing(again))
    again.change({7})
    subscriber.publisher = again
    assert subscriber.agrees()


@pytest.mark.parametrize("junk", [[b"one frame"], [b"", b"", b"", b""]])
def test_what_is_no_batch_is_left_out(
    stack: ExitStack, junk: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    publisher = stack.enter_context(closing(Publisher(first=1)))
    subscriber = stack.enter_context(closing(Subscriber(publisher, expected=0)))
    publisher.change({1})

    def heard() -> bool:
        publisher.sockets._out.send_multipart(junk)
        return "batch" in caplog.text

    assert subscriber.hear_until(heard)
    assert subscriber.agrees()


def test_a_batch_that_cannot_be_read_holds_up_nobody(stack: ExitStack) -> None:
    receiver = stack.enter_context(closing(BatchReceiver("inproc://nobody", expected=0)))
    receiver._published([b"", bytes(8), b"\xc1"])
    receiver._published(frames(1, Removed((3,))))
    assert [batch.events for batch in receiver.receive()] == [(Removed((3,)),)]
    assert receiver.lost == 0


def test_a_message_without_a_number_is_read(stack: ExitStack) -> None:
    receiver = stack.enter_context(closing(BatchReceiver("inproc://nobody")))
    receiver._published([b"", encode_batch(Batch(0.0, (Removed((3,)),)))])
    assert [batch.events for batch in receiver.receive()] == [(Removed((3,)),)]


@pytest.mark.parametrize("seed", range(5))
def test_subscribers_that_die_at_random_agree_with_the_publisher(
    stack: ExitStack, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_log, "KEPT_BATCHES", 20)
    monkeypatch.setattr(batch_log, "BATCH_EVENTS", 7)
    dice = random.Random(seed)
    publisher = stack.enter_context(closing(Publisher()))
    subscriber = Subscriber(publisher)
    for _ in range(150):
        added = {dice.randint(0, 60) for _ in range(dice.randint(0, 12))} - publisher.blocks
        removed = {block for block in publisher.blocks if dice.random() < 0.1} - added
        publisher.change(added, removed)
        if dice.random() < 0.6:
            subscriber.hear(0)
        if dice.random() < 0.1:
            subscriber.close()
            subscriber = Subscriber(publisher)
    stack.enter_context(closing(subscriber))
    assert subscriber.agrees()
    assert subscriber.receiver.lost == 0
