# SPDX-License-Identifier: Apache-2.0
"""The whole way: an engine's publisher, tables that change, a router that dies at random."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest

pytest.importorskip("zmq")

from kvbm._fast.keys import Keys
from kvbm.events import zmq_receiver
from kvbm.events.batch_log import BatchLog
from kvbm.events.index import EventIndex
from kvbm.events.model import Cleared, Removed, Stored, Tier
from kvbm.events.msgspec_wire import encode_batch
from kvbm.events.table_keys import EngineKeys
from kvbm.events.table_source import TableSource
from kvbm.events.tracker import Mode
from kvbm.events.zmq_consolidator import (
    Consolidator,
    Endpoints,
    start_consolidator,
)
from kvbm.events.zmq_publisher import BatchPublisher
from kvbm.events.zmq_receiver import BatchReceiver
from tests.events.sockets import ANYWHERE, DEADLINE_S
from tests.fast.instances import Instance, cache, digests, instance
from tests.leaks import wait_until


class Rig:
    """An engine with a device cache, a host tier, their consolidator and a router.

    The engine's hashes are those of `digests`; the device has room for a few chains.
    """

    def __init__(self, stack: ExitStack, mode: Mode = "dedup", rank: int = 0) -> None:
        self.stack = stack
        self.tier: Instance = instance(host_slots=24)
        stack.callback(self.tier.remove)
        self.table = self.tier.leader()
        self.engine = stack.enter_context(
            closing(BatchPublisher(BatchLog(encode_batch, rank, 0), ANYWHERE, ANYWHERE))
        )
        self.device: dict[int, list[int]] = {}
        self.consolidator = Consolidator(
            Endpoints(self.engine.endpoint, ANYWHERE, ANYWHERE, self.engine.replay_endpoint),
            [TableSource(Tier.HOST, self.tier.name, lambda: True)],
            EngineKeys(),
            mode,
            rank=rank,
        )
        stack.enter_context(closing(self.consolidator))
        self.index = EventIndex()
        self.ranks: set[int] = set()
        self.router = self.new_router()

    def new_router(self) -> BatchReceiver:
        """A router that knows nothing."""
        self.index = EventIndex()
        return BatchReceiver(self.consolidator.endpoint, self.consolidator.replay_endpoint)

    def compute(self, seed: int, count: int) -> None:
        """The engine computes a prompt: its blocks come to the device, then to the host tier."""
        keys = Keys(digests(count, seed))
        hashes = list(memoryview(keys.sequence_hashes(0, count)).cast("Q"))
        known = len(self.device.get(seed, []))
        self.device[seed] = hashes[: max(known, count)] if known < count else self.device[seed]
        events = [
            Stored(hashes[i], hashes[i - 1] if i else None, (seed, i), medium="GPU")
            for i in range(known, count)
        ]
        self.engine.publish(events)
        cache(self.table, keys)

    def forget(self, seed: int) -> None:
        """The device forgets a prompt."""
        self.engine.publish([Removed(tuple(reversed(self.device.pop(seed, []))), "GPU")])

    def truth(self) -> dict[int, int]:
        """Tiers of each block."""
        found = dict.fromkeys((v for chain in self.device.values() for v in chain), 1)
        for number, block in enumerate(self.tier.raw.blocks()):
            if block.state == 2:
                value = self.tier.raw.cold(number)[0]
                found[value] = found.get(value, 0) | Tier.HOST
        return found

    def hear(self) -> None:
        """The router listens, and the engine answers who missed something."""
        self.engine.answer(lambda: iter(()))
        for batch in self.router.receive(0.01):
            self.index.apply(batch)
            self.ranks.add(batch.rank)

    def agrees(self, exactly: bool) -> bool:
        """Whether the router comes to know the truth, in dedup mode without the tiers."""

        def holds() -> bool:
            self.hear()
            truth = self.truth()
            return (
                self.index.blocks == truth if exactly else self.index.blocks.keys() == truth.keys()
            )

        return wait_until(holds, DEADLINE_S)


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    """Closes at the end; questions are asked often."""
    monkeypatch.setattr(zmq_receiver, "ASK_SECS", 0.05)
    with ExitStack() as made:
        yield made


@pytest.mark.parametrize("mode", ["dedup", "passthrough"])
def test_a_router_that_is_killed_at_random_knows_the_truth(stack: ExitStack, mode: Mode) -> None:
    rig, dice = Rig(stack, mode), random.Random(3)
    for _ in range(60):
        rig.compute(dice.randint(0, 5), dice.randint(1, 8))
        if dice.random() < 0.4:
            rig.forget(dice.randint(0, 5))
        if dice.random() < 0.03:
            rig.table.reset()
        rig.hear()
        if dice.random() < 0.2:
            rig.router.close()
            rig.router = rig.new_router()
    stack.enter_context(closing(rig.router))
    assert rig.agrees(exactly=mode == "passthrough")
    assert rig.router.lost == 0
    parents = [parent for parent in rig.index.parents.values() if parent is not None]
    assert set(parents) <= rig.index.blocks.keys()


def test_the_host_tier_keeps_what_the_device_forgets(stack: ExitStack) -> None:
    rig = Rig(stack)
    stack.enter_context(closing(rig.router))
    rig.compute(1, 4)
    rig.compute(2, 4)
    assert rig.agrees(exactly=False)
    rig.forget(1)
    rig.engine.publish([Cleared()])
    rig.device.clear()
    assert rig.agrees(exactly=False)
    assert len(rig.index.blocks) == 8
    rig.table.reset()
    assert rig.agrees(exactly=False)
    assert rig.index.blocks == {}


def test_batches_have_the_data_parallel_rank_of_the_engine(stack: ExitStack) -> None:
    rig = Rig(stack, rank=3)
    stack.enter_context(closing(rig.router))
    rig.compute(1, 2)
    assert rig.agrees(exactly=False)
    assert 3 in rig.ranks


def test_reuse_may_be_told_of_once_that_is_said(stack: ExitStack) -> None:
    rig = Rig(stack, "passthrough")
    stack.enter_context(closing(rig.router))
    rig.consolidator.expect_reuse()
    rig.compute(1, 2)
    first, second = rig.device[1]
    rig.engine.publish([Stored(first, None, (1, 0), medium="GPU")])
    rig.engine.publish([Removed((second, first), "GPU")])
    rig.device.clear()
    assert rig.agrees(exactly=True)


def test_a_port_in_use_costs_the_events_alone(
    stack: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    rig = Rig(stack)
    rig.router.close()
    taken = Endpoints(rig.engine.endpoint, rig.consolidator.endpoint, ANYWHERE)
    made = start_consolidator(lambda: Consolidator(taken, [], EngineKeys()), "there", "SETTING")
    assert made is None
    assert "no KV events at there" in caplog.text
    assert "another SETTING" in caplog.text


def test_a_failure_ends_the_events_with_a_line_in_the_log(
    stack: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    engine = stack.enter_context(
        closing(BatchPublisher(BatchLog(encode_batch), ANYWHERE, ANYWHERE))
    )
    missing = TableSource(Tier.HOST, "/kvbm-no-such-segment", lambda: True)
    endpoints = Endpoints(engine.endpoint, ANYWHERE, ANYWHERE)
    with closing(Consolidator(endpoints, [missing], EngineKeys())):
        assert wait_until(lambda: "not published any more" in caplog.text, DEADLINE_S)
