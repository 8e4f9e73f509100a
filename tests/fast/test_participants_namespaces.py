# SPDX-License-Identifier: Apache-2.0
"""Liveness between pid namespaces that share /dev/shm, as containers do: process ids mean nothing.

The first process of a namespace has id 1 there, the id of a process that always lives here; and the
id that this process writes down is nobody's there. Whoever went by ids would be wrong both times.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvbm._fast.participants import line_is_alive, participants
from kvbm._fast.recovery import recover
from tests.fast.instances import Instance
from tests.leaks import wait_until

Make = Callable[..., Instance]
NAMESPACE = ("unshare", "--pid", "--fork", "--kill-child")

INSIDE = """
import os, sys
from kvbm._fast.keys import Keys
from kvbm._fast.operation_table import OperationTable
from kvbm._fast.participants import claim_leader, participants
from kvbm._fast.recovery import recover
from kvbm._fast.segment import Segment
segment = Segment.attach(sys.argv[1])
recover(segment)  # what it takes for dead, it would take away
others = [(line.leader, line.alive) for line in participants(segment)]
claim_leader(segment, 2)
keys = Keys([bytes([i]) * 16 for i in range(4)])
OperationTable(segment).reserve(keys, 0, 4)
print(os.getpid(), others, flush=True)
sys.stdin.read()
"""


def may_make_namespaces() -> bool:
    """Whether this process may run a child in a pid namespace of its own."""
    try:
        return (
            subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode == 0
        )
    except FileNotFoundError:
        return False


pytestmark = pytest.mark.skipif(not may_make_namespaces(), reason="may not make a pid namespace")


@contextmanager
def leader_in_a_namespace(made: Instance) -> Iterator[tuple[int, str]]:
    """A leader there that holds four blocks: its process id here, and what it said."""
    command = [*NAMESPACE, sys.executable, "-c", INSIDE, made.name]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        said = process.stdout.readline()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        yield int(children), said
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_life_and_death_are_seen_across_pid_namespaces(make_instance: Make) -> None:
    made = make_instance(16)
    table = made.leader()
    assert table.segment.leader == 0
    with leader_in_a_namespace(made) as (pid, said):
        assert said == "1 [(0, True)]\n"
        (line,) = [line for line in participants(made.creator) if line.leader == 1]
        assert line.pid == 1, "the id of a process that lives here whatever happens there"
        assert line.alive
        assert recover(table.segment) == 0
        assert made.creator.free_blocks() == 12
        os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda: not line_is_alive(made.creator, line.line))
        assert recover(table.segment) == 1
        assert made.creator.free_blocks() == 16
