# SPDX-License-Identifier: Apache-2.0
"""Copies and the engine's kernels on a real device: the order in which each sees the bytes.

Each of the three promises is shown to hold, and to break when the place that a copy waits for is
taken on a stream that has nothing to do, which is what a missing event would be.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from kvbm._fast.keys import Keys
from tests.copy_rig import CHUNK, LAYERS, SLOTS, Rig, content
from tests.fast.instances import Instance, digests
from tests.gpu.memory import CudaMemory, torch_with_cuda
from tests.leaks import wait_until

pytestmark = pytest.mark.gpu

FILLED = 7
OVERWRITTEN = 99


@pytest.fixture(params=[False, True], ids=["straight", "staged"])
def memory(request: pytest.FixtureRequest) -> CudaMemory:
    return CudaMemory(staged=request.param)


@pytest.fixture
def rig(make_instance: Callable[..., Instance], memory: CudaMemory) -> Iterator[Rig]:
    made = Rig(make_instance(host_slots=SLOTS), memory)
    made.start()
    yield made
    made.close()


@pytest.fixture
def idle_stream() -> Iterator[int]:
    """A stream that the engine does not use."""
    torch = torch_with_cuda()
    stream = torch.cuda.Stream()
    yield int(stream.cuda_stream)
    torch.cuda.synchronize()


def filled(value: int) -> bytes:
    """Bytes of a block that a kernel has filled."""
    return bytes([value]) * (LAYERS * CHUNK)


def stored_bytes(rig: Rig) -> bytes:
    """Bytes of the only valid slot."""
    slot = int((rig.headers["word"] >> 60 == 2).argmax())
    pieces = rig.layout.pieces(slot)
    return b"".join(rig.arena[at : at + size] for at, size in pieces)


def store_behind_a_long_kernel(rig: Rig, memory: CudaMemory, stream: int) -> bytes:
    """Store a block that is filled by a kernel behind a long one; returns what was stored."""
    memory.write(3, content(1))
    memory.launch_long_kernel()
    memory.launch_fill(3, FILLED)
    handle = rig.store(Keys(digests(1)), [3], 1)
    rig.loop.fill_step(1, stream)
    assert memory.is_busy()  # nobody waited on this thread
    assert rig.collected(handle) is True
    return stored_bytes(rig)


def test_a_store_reads_what_the_forward_pass_writes(rig: Rig, memory: CudaMemory) -> None:
    assert store_behind_a_long_kernel(rig, memory, memory.stream()) == filled(FILLED)


def test_without_the_event_a_store_reads_too_early(
    rig: Rig, memory: CudaMemory, idle_stream: int
) -> None:
    assert store_behind_a_long_kernel(rig, memory, idle_stream) == content(1)


def load_behind_a_long_kernel(rig: Rig, memory: CudaMemory, stream: int) -> bytes:
    """Load into a block that its last owner's kernels still write; returns what it has."""
    keys = rig.stored("a", [1])
    memory.launch_long_kernel()
    memory.launch_fill(5, OVERWRITTEN)
    ref, handle = rig.load(keys, [5], 4)
    rig.loop.bind_step(4, stream)
    assert memory.is_busy()
    assert rig.collected(handle) is True
    rig.table.unpin(ref)
    return memory.read(5)


def test_a_load_writes_after_the_last_owner_of_the_block(rig: Rig, memory: CudaMemory) -> None:
    assert load_behind_a_long_kernel(rig, memory, memory.stream()) == content(0)


def test_without_the_event_a_load_is_overwritten(
    rig: Rig, memory: CudaMemory, idle_stream: int
) -> None:
    assert load_behind_a_long_kernel(rig, memory, idle_stream) == filled(OVERWRITTEN)


def stop_then_overwrite(rig: Rig, memory: CudaMemory, stream: int) -> bytes:
    """Preempt while a store waits for a long kernel, and overwrite its block."""
    memory.write(3, content(1))
    handle = rig.store(Keys(digests(1)), [3], 1)
    side = memory.torch.cuda.Stream()
    with memory.torch.cuda.stream(side):  # the store waits here, the engine does not
        memory.launch_long_kernel()
        rig.loop.fill_step(1, memory.stream())
    assert wait_until(lambda: rig.copies.backend.statistics()["blocks"] == 1)
    assert rig.loop.cancel_and_wait(handle, 1000, stream)
    assert not side.query()  # it returned while the store had not even begun
    memory.launch_fill(3, OVERWRITTEN)
    assert rig.collected(handle) is True
    return stored_bytes(rig)


def test_the_block_of_a_stopped_store_is_overwritten_after_the_copy(
    rig: Rig, memory: CudaMemory
) -> None:
    assert stop_then_overwrite(rig, memory, memory.stream()) == content(1)


def test_without_the_wait_the_copy_takes_what_comes_after(
    rig: Rig, memory: CudaMemory, idle_stream: int
) -> None:
    assert stop_then_overwrite(rig, memory, idle_stream) == filled(OVERWRITTEN)


BROKEN_DEVICE = """
import torch
from tests.copy_rig import SLOTS, Rig
from tests.fast.instances import digests, instance
from tests.gpu.memory import CudaMemory
from tests.leaks import wait_until
from kvbm._fast.keys import Keys
from kvbm._fast.participants import participants

memory, made = CudaMemory(), instance(host_slots=SLOTS)
rig = Rig(made, memory)
rig.start()
keys = rig.stored("good", [1])
index = torch.full((1,), 1 << 40, device="cuda")
torch.zeros(4, device="cuda")[index]  # an assertion on the device: its context is lost
lost = [Keys(digests(1, i)) for i in range(5)]
handles = []
for i, key in enumerate(lost):
    handles.append(rig.store(key, [i], 2))
    rig.loop.bind_step(3 + i, memory.stream())
assert [rig.collected(handle) for handle in handles] == [False] * 5
assert all(rig.table.match(key, 0, 1) == (0, None) for key in lost)
assert rig.copies.backend.is_switched_off
assert wait_until(
    lambda: [p.alive for p in participants(rig.table.segment) if p.role == "worker"] == [False]
)
rig.stop()
print("survived")
made.remove()
import os
os._exit(0)  # what else lives in the broken context cannot be taken down
"""


def test_a_lost_device_fails_the_copies_and_publishes_nothing() -> None:
    torch_with_cuda()
    command = [sys.executable, "-c", BROKEN_DEVICE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert "survived" in done.stdout, done.stdout + done.stderr
    assert "switched off" in done.stderr
