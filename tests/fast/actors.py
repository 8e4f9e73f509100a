# SPDX-License-Identifier: Apache-2.0
"""Participants in processes of their own, which a test can stop, continue and kill."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from kvbm._fast.keys import Keys
from kvbm._fast.operation_table import OperationTable
from kvbm._fast.participants import claim_leader, claim_worker
from kvbm._fast.segment import Segment
from tests.fast.instances import digests

Script = Callable[[str, Connection], None]


def hold_reserved_and_pinned(name: str, pipe: Connection) -> None:
    """A leader that has registered 4 blocks, pins their chain, and has 3 more reserved."""
    segment = Segment.attach(name)
    claim_leader(segment, 77)
    table = OperationTable(segment)
    keys = Keys(digests(7, "theirs"))
    registered = [ref for ref, _ in table.reserve(keys, 0, 4)]
    table.publish(registered)
    table.reserve(keys, 4, 7, registered[-1])
    pipe.send(registered)
    pipe.recv()


def hold_submitted_operations(name: str, pipe: Connection) -> None:
    """A leader with a store of 3 blocks that no worker has begun."""
    segment = Segment.attach(name)
    leader = claim_leader(segment, 77)
    table = OperationTable(segment)
    handles, _, _ = table.store(Keys(digests(3, "theirs")), 0, 3, [0, 1, 2], None, 1)
    pipe.send((leader, handles))
    pipe.recv()


def hold_worker_line(name: str, pipe: Connection) -> None:
    """A worker, rank 0, of the leader whose number the test sends."""
    segment = Segment.attach(name)
    claim_worker(segment, pipe.recv(), 0)
    pipe.send("claimed")
    pipe.recv()


class Actor:
    """A process that runs a script on a segment and then waits to be killed."""

    def __init__(self, script: Script, name: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=script, args=(name, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def result(self) -> Any:
        """What the script sends once it is where the test wants it."""
        assert self.pipe.poll(30), "the actor did not get there within 30 s"
        return self.pipe.recv()

    def signal(self, number: int) -> None:
        """Send a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """kill -9, and wait until the process is gone."""
        if self.process.is_alive():
            self.signal(signal.SIGKILL)
        self.process.join(30)
        self.pipe.close()


@contextlib.contextmanager
def actor(script: Script, name: str) -> Iterator[Actor]:
    """An actor that is gone when the block ends."""
    one = Actor(script, name)
    try:
        yield one
    finally:
        one.kill()
