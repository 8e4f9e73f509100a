# SPDX-License-Identifier: Apache-2.0
"""What is left of killed engines goes with the process that they were started from."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import pytest

import kvbm.shared
from kvbm._fast.objects import object_path
from kvbm._fast.segment import Segment
from kvbm.instance import (
    instances,
    private_instance,
    remove,
    remove_dead_private_instances,
    segment_name,
)
from kvbm.shared import remove_as_engines_end
from tests.leaks import wait_until
from tests.mounts import NOBODY, mount, with_mounts
from tests.small_engine import SmallEngine, unique_engine_id

LONG_S = 60.0

# A process, the connection to it, and the first that it says.
Started = tuple[BaseProcess, Connection, str]
Start = Callable[..., Started]


def be_engine(connection: Connection) -> None:
    """Be an engine with both sides in one process, until it is killed."""
    engine = SmallEngine(16)
    connection.send(engine.instance)
    connection.recv()


def be_worker(connection: Connection, instance: str) -> None:
    """Use an instance as a worker does that outlives its leader."""
    segment = Segment.attach(segment_name(instance))
    connection.send("attached")
    connection.recv()
    segment.close()


@pytest.fixture
def start() -> Iterator[Start]:
    """Start processes, which are gone at the end."""
    started = []

    def begin(target: Callable[..., None], *more: str) -> Started:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=target, args=(theirs, *more))
        process.start()
        started.append((process, ours))
        return process, ours, ours.recv()

    yield begin
    for process, connection in started:
        process.kill()
        process.join()
        process.close()
        connection.close()
    remove_dead_private_instances()


def kill(process: BaseProcess) -> None:
    """End a process as `vllm serve` does."""
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_a_killed_engine_leaves_nothing_and_a_live_one_stays(start: Start) -> None:
    killed, _, left = start(be_engine)
    _, _, alive = start(be_engine)
    kill(killed)
    assert left in instances()
    remove_as_engines_end(LONG_S)
    assert left not in instances()
    assert alive in instances()


def test_a_worker_that_is_still_dying_is_waited_for(start: Start) -> None:
    leader, _, instance = start(be_engine)
    worker, connection, _ = start(be_worker, instance)
    kill(leader)
    waiting = threading.Thread(target=remove_as_engines_end, args=(LONG_S,))
    waiting.start()
    assert not wait_until(lambda: instance not in instances(), 0.1)
    connection.send("end")
    worker.join()
    waiting.join(LONG_S)
    assert instance not in instances()


def test_a_worker_that_does_not_die_is_waited_for_a_bounded_time(start: Start) -> None:
    leader, _, instance = start(be_engine)
    worker, _, _ = start(be_worker, instance)
    kill(leader)
    remove_as_engines_end(0.05)
    assert instance in instances()
    kill(worker)
    remove_as_engines_end(LONG_S)
    assert instance not in instances()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_what_another_users_engine_left_is_neither_removed_nor_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def check() -> None:
        mount(options="mode=1777")
        engine = SmallEngine(16)
        name = engine.instance
        saved = object_path(segment_name(name)).read_bytes()
        engine.close()
        path = object_path(segment_name(name))
        path.write_bytes(saved)
        os.chown(path, NOBODY, NOBODY)
        monkeypatch.setattr(kvbm.shared.time, "sleep", lambda _: os._exit(3))
        remove_as_engines_end(LONG_S)
        assert path.exists()

    with_mounts(check)


def test_a_named_cache_and_a_name_without_a_segment_are_left() -> None:
    private = private_instance(unique_engine_id())
    engine = SmallEngine(16, instance=f"end-{os.getpid()}")
    engine.close()
    object_path(segment_name(private)).symlink_to("nowhere")
    try:
        remove_as_engines_end(LONG_S)
        assert {engine.instance, private} <= set(instances())
    finally:
        remove(private)
        remove(engine.instance)
