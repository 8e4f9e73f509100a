# SPDX-License-Identifier: Apache-2.0
"""Leaders that are killed at random moments, again and again, while others go on.

KVBM_STRESS_SECONDS sets the length (default 8; `make stress` sets more), KVBM_STRESS_SEED the seed.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait

import pytest

from kvbm._fast.keys import Keys
from kvbm._fast.recovery import recover
from tests.fast.instances import Instance, digests, instance
from tests.fast.raw_segment import BLOCKS, HOST, REGISTERED, RESET
from tests.stress.traffic import Payloads, recover_timed, run

SECONDS = float(os.environ.get("KVBM_STRESS_SECONDS", "8"))
SEED = int(os.environ.get("KVBM_STRESS_SEED", "1"))
LEADERS = 4


def leader(name: str, seed: int, seconds: float, pipe: Connection) -> None:
    run(name, seed, seconds, lambda done: pipe.send(Counter(done)))
    pipe.close()


class Herd:
    """Leader processes that are started again when they are killed."""

    def __init__(self, name: str, seconds: float) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.name = name
        self.end = time.monotonic() + seconds
        self.choose = random.Random(SEED)
        self.processes: dict[Connection, multiprocessing.process.BaseProcess] = {}
        self.done: Counter[str] = Counter()
        self.kills = 0
        self.seed = SEED * 1000

    def start(self) -> None:
        mine, theirs = self.context.Pipe(duplex=False)
        self.seed += 1
        left = max(0.5, self.end - time.monotonic())
        process = self.context.Process(
            target=leader, args=(self.name, self.seed, left, theirs), daemon=True
        )
        process.start()
        theirs.close()
        self.processes[mine] = process

    def listen(self, seconds: float) -> None:
        """Collect reports for a while; forget processes that have ended."""
        until = time.monotonic() + seconds
        while self.processes and (left := until - time.monotonic()) > 0:
            for pipe in wait(list(self.processes), left):
                assert isinstance(pipe, Connection)
                try:
                    self.done.update(pipe.recv())
                except (EOFError, OSError):
                    self.processes.pop(pipe).join()
                    pipe.close()

    def kill_one(self) -> None:
        pipe = self.choose.choice(list(self.processes))
        process = self.processes[pipe]
        assert process.pid is not None
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            self.kills += 1

    def run(self) -> None:
        while time.monotonic() < self.end:
            while len(self.processes) < LEADERS:
                self.start()
            self.listen(self.choose.uniform(0.05, 0.4))
            if self.processes:
                self.kill_one()
        self.listen(30)

    def stop(self) -> None:
        for pipe, process in self.processes.items():
            process.kill()
            process.join()
            pipe.close()


@pytest.fixture
def small() -> Iterator[Instance]:
    """A segment so small that the traffic evicts all the time."""
    one = instance(host_slots=200)
    payloads = Payloads(one.name, 200)
    try:
        yield one
    finally:
        payloads.close(remove=True)
        one.remove()


def left_after(small: Instance) -> dict[str, int]:
    """What the last recovery leaves that is not as it must be, by kind."""
    blocks = small.raw.blocks()
    named = {block.placements[0].slot for block in blocks if block.state != RESET}
    used = {index for index, block in enumerate(blocks) if block.state != RESET}
    slots, records = set(range(len(blocks))) - named, set(range(len(blocks))) - used
    return {
        "holds left": sum(len(block.holders) for block in blocks),
        "half done": sum(block.state not in (RESET, REGISTERED) for block in blocks),
        "slots leaked": len(slots ^ small.raw.free(HOST)),
        "records leaked": len(records ^ small.raw.free(BLOCKS)),
    }


class Keeper:
    """A leader that nobody kills: it holds a chain from the beginning to the end."""

    def __init__(self, small: Instance) -> None:
        self.table = small.leader(engine_key=9)
        self.payloads = Payloads(small.name, 200)
        self.hashes = digests(8, "kept")
        self.refs = []
        for (ref, slot), digest in zip(
            self.table.reserve(Keys(self.hashes), 0, 8), self.hashes, strict=True
        ):
            self.payloads.write(slot, digest)
            self.refs.append(ref)
        assert self.table.publish(self.refs) == 8

    def lost(self) -> int:
        """How many of its blocks are not registered any more."""
        return sum(not self.table.is_current(ref) for ref in self.refs)

    def wrong(self) -> int:
        """How many of its blocks hold other bytes."""
        slots = self.table.slots_of(self.refs[-1], 8)
        pairs = zip(slots, self.hashes, strict=True)
        return sum(self.payloads.read(slot) != digest[:16] for slot, digest in pairs)

    def close(self) -> None:
        for ref in self.refs:
            self.table.unpin(ref)
        self.payloads.close()
        self.table.segment.close()


def test_killed_leaders_leave_no_wrong_block_no_lost_slot_and_no_pin(
    small: Instance, summary: list[str]
) -> None:
    keeper, herd = Keeper(small), Herd(small.name, SECONDS)
    try:
        herd.run()
    finally:
        herd.stop()
    done = herd.done
    recover_timed(small.creator, done)
    recover(small.creator, rebuild=True)
    done["lost"] += keeper.lost()
    done["wrong"] += keeper.wrong()
    keeper.close()
    left = left_after(small)
    summary.append(
        f"kill -9: {sum(done[k] for k in ('match', 'store', 'give_up'))} operations, "
        f"{done['read']} blocks read, {done['stored']} stored, {herd.kills} kills, "
        f"{done['wrong']} wrong blocks, {done['lost']} registered blocks lost, "
        + ", ".join(f"{count} {kind}" for kind, count in left.items())
        + f"; {done['recoveries']} recoveries, "
        f"{done['recovery_us'] / 1e3 / max(1, done['recoveries']):.2f} ms each; seed {SEED}"
    )
    assert done["wrong"] == done["lost"] == 0
    assert not any(left.values()), left
    small.raw.check_invariants()
    small.raw.check_idle()
    assert herd.kills > 0
    assert done["recoveries"] > 0
    assert done["stored"] > 0
    assert done["read"] > 0
