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

from kvbm._fast.recovery import recover
from tests.fast.instances import Instance, instance
from tests.stress.traffic import Payloads, run

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


def test_killed_leaders_leave_no_wrong_block_no_lost_slot_and_no_pin(
    small: Instance, capsys: pytest.CaptureFixture[str]
) -> None:
    herd = Herd(small.name, SECONDS)
    try:
        herd.run()
    finally:
        herd.stop()
    began = time.monotonic()
    recover(small.creator, rebuild=True)
    took = time.monotonic() - began
    small.raw.check_invariants()
    small.raw.check_idle()
    with capsys.disabled():
        print(
            f"\nstress: {sum(herd.done[k] for k in ('match', 'store', 'give_up'))} operations, "
            f"{herd.done['read']} blocks read, {herd.done['stored']} stored, {herd.kills} kills, "
            f"{herd.done['wrong']} wrong blocks; last recovery {took * 1e3:.1f} ms; seed {SEED}"
        )
    assert herd.kills > 0
    assert herd.done["stored"] > 0
    assert herd.done["read"] > 0
    assert herd.done["wrong"] == 0
