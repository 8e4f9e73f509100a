# SPDX-License-Identifier: Apache-2.0
"""Order, errors and ends of copies on streams, with the simulated driver.

Each promise about order is also shown to break when waits for events have no effect. What every
backend promises is in test_worker_loop.py; the same on a real device is in tests/gpu.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest

from kvbm._fast.cuda_backend import CudaBackend
from kvbm._fast.keys import Keys
from kvbm._fast.participants import participants
from tests.copy_rig import CHUNK, LAYERS, SLOTS, FakeMemory, Rig, content
from tests.fast.instances import Instance, digests
from tests.leaks import wait_until

ILLEGAL_ADDRESS = 700
FILLED = 7


@pytest.fixture(params=[False, True], ids=["straight", "staged"])
def memory(request: pytest.FixtureRequest) -> FakeMemory:
    return FakeMemory(staged=request.param)


def copying_call(memory: FakeMemory) -> str:
    """Name of the driver's function that copies of this memory need."""
    return "cuMemcpy2DAsync" if memory.staged else "cuMemcpyBatchAsync"


@pytest.fixture
def rig(make_instance: Callable[..., Instance], memory: FakeMemory) -> Iterator[Rig]:
    made = Rig(make_instance(host_slots=SLOTS), memory)
    made.start()
    yield made
    memory.cuda.hold_engine(False)
    memory.cuda.run()
    made.close()
    assert memory.cuda.alive == 0


def backend(rig: Rig) -> CudaBackend:
    assert isinstance(rig.copies.backend, CudaBackend)
    return rig.copies.backend


def submitted(rig: Rig, blocks: int) -> bool:
    """Wait until so many blocks have been submitted in all."""
    return wait_until(lambda: backend(rig).statistics()["blocks"] == blocks)


def filled(value: int) -> bytes:
    return bytes([value]) * (LAYERS * CHUNK)


def stored_bytes(rig: Rig) -> bytes:
    """Bytes of the first valid slot."""
    slot = int((rig.headers["word"] >> 60 == 2).argmax())
    return b"".join(rig.arena[at : at + size] for at, size in rig.layout.pieces(slot))


def store_behind_a_kernel(rig: Rig, memory: FakeMemory) -> bytes:
    """Store a block that a kernel behind a long one fills; returns what was stored."""
    memory.write(3, content(1))
    memory.cuda.hold_engine(True)
    memory.launch_fill(3, FILLED)
    handle = rig.store(Keys(digests(1)), [3], 1)
    rig.loop.fill_step(1)
    assert submitted(rig, 1)
    memory.cuda.run()
    memory.cuda.hold_engine(False)
    assert rig.collected(handle) is True
    return stored_bytes(rig)


def test_a_store_reads_what_the_forward_pass_writes(rig: Rig, memory: FakeMemory) -> None:
    assert store_behind_a_kernel(rig, memory) == filled(FILLED)


def test_without_the_event_a_store_reads_too_early(rig: Rig, memory: FakeMemory) -> None:
    memory.cuda.ignore_waits()
    assert store_behind_a_kernel(rig, memory) == content(1)


def load_behind_a_kernel(rig: Rig, memory: FakeMemory) -> bytes:
    """Load into a block that its last owner's kernels still write; returns what it has."""
    keys = rig.stored("a", [1])
    memory.cuda.hold_engine(True)
    memory.launch_fill(5, FILLED)
    ref, handle = rig.load(keys, [5], 4)
    rig.loop.bind_step(4)
    assert submitted(rig, 2)
    memory.cuda.run()
    memory.cuda.hold_engine(False)
    memory.cuda.run()
    assert rig.collected(handle) is True
    rig.table.unpin(ref)
    return memory.read(5)


def test_a_load_writes_after_the_last_owner_of_the_block(rig: Rig, memory: FakeMemory) -> None:
    assert load_behind_a_kernel(rig, memory) == content(0)


def test_without_the_event_a_load_is_overwritten(rig: Rig, memory: FakeMemory) -> None:
    memory.cuda.ignore_waits()
    assert load_behind_a_kernel(rig, memory) == filled(FILLED)


def test_a_copy_waits_for_the_place_of_its_step_long_after(rig: Rig, memory: FakeMemory) -> None:
    # More steps than places are remembered: a younger place is as good.
    memory.write(3, content(1))
    rig.stop()
    rig.loop = type(rig.loop)(rig.segment, rig.copies.backend)
    handle = rig.store(Keys(digests(1)), [3], 2)
    memory.cuda.hold_engine(True)
    memory.launch_fill(3, FILLED)
    for step in range(2, 200):
        rig.loop.fill_step(step)
    rig.start()
    assert submitted(rig, 1)
    assert not rig.loop.rank_ended(handle)
    memory.cuda.hold_engine(False)
    assert rig.collected(handle) is True
    assert stored_bytes(rig) == filled(FILLED)


def stop_then_overwrite(rig: Rig, memory: FakeMemory) -> bytes:
    """Preempt while a store waits for the engine, and overwrite its block."""
    memory.write(3, content(1))
    memory.cuda.hold_engine(True)
    handle = rig.store(Keys(digests(1)), [3], 1)
    rig.loop.fill_step(1)
    assert submitted(rig, 1)
    assert rig.loop.cancel_and_wait(handle, 1000)  # returns while the engine is held
    assert not rig.loop.rank_ended(handle)
    memory.launch_fill(3, FILLED)
    memory.cuda.hold_engine(False)
    assert rig.collected(handle) is True
    return stored_bytes(rig)


def test_the_block_of_a_stopped_store_is_overwritten_after_the_copy(
    rig: Rig, memory: FakeMemory
) -> None:
    assert stop_then_overwrite(rig, memory) == content(1)


def test_an_operation_in_several_chunks_arrives_whole(rig: Rig, memory: FakeMemory) -> None:
    # Four operations at once, each in as many chunks as the engine lets through.
    chains = {i: rig.store(Keys(digests(9, i)), range(9 * i, 9 * i + 9), 1) for i in range(4)}
    for block in range(36):
        memory.write(block, content(block))
    rig.loop.fill_step(1)
    assert [rig.collected(handle) for handle in chains.values()] == [True] * 4
    assert rig.loaded(Keys(digests(9, 2)), range(39, 48), 1) is True
    assert [memory.read(39 + i) for i in range(9)] == [content(18 + i) for i in range(9)]


@pytest.mark.parametrize("symbol", ["copy", "cuStreamWaitEvent", "cuEventRecord", "cuEventQuery"])
def test_an_error_fails_the_operation_and_the_next_one_works(
    rig: Rig, memory: FakeMemory, symbol: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = rig.store(Keys(digests(2, "first")), [1, 2], 1)
    rig.loop.bind_step(2)
    assert rig.collected(first) is True
    lost = Keys(digests(2, "lost"))
    with caplog.at_level(logging.ERROR, "kvbm.cuda"):
        handle = rig.store(lost, [3, 4], 2)
        symbol = copying_call(memory) if symbol == "copy" else symbol
        memory.cuda.fail(symbol, error=ILLEGAL_ADDRESS)
        rig.loop.fill_step(2)
        assert rig.collected(handle) is False
    assert "CUDA_ERROR_SIMULATED" in caplog.text
    assert rig.table.match(lost, 0, 2) == (0, None)
    assert rig.collected(rig.store(Keys(digests(2, "after")), [5, 6], 1)) is True


def test_a_failed_load_names_its_device_blocks(rig: Rig, memory: FakeMemory) -> None:
    keys = rig.stored("a", [1, 2, 3])
    memory.cuda.fail(copying_call(memory), error=ILLEGAL_ADDRESS)
    ref, handle = rig.load(keys, [21, 22, 23], 2)
    rig.loop.bind_step(2)
    assert wait_until(lambda: rig.loop.rank_ended(handle))
    assert rig.loop.failed_device_blocks(handle) == [21, 22, 23]
    assert rig.collected(handle) is False
    rig.table.unpin(ref)
    assert rig.loaded(keys, [31, 32, 33], 2) is True


def test_after_three_errors_in_a_row_the_backend_gives_up_and_its_worker_counts_as_dead(
    rig: Rig, memory: FakeMemory, caplog: pytest.LogCaptureFixture
) -> None:
    rig.loop.fill_step(1)
    memory.cuda.fail(copying_call(memory), error=ILLEGAL_ADDRESS, times=3)
    with caplog.at_level(logging.ERROR, "kvbm.cuda"):
        for i in range(3):
            assert rig.collected(rig.store(Keys(digests(2, i)), [1, 2], 1)) is False
    assert backend(rig).is_switched_off
    assert "switched off" in caplog.text
    assert wait_until(
        lambda: [p.alive for p in participants(rig.table.segment) if p.rank == 0] == [False]
    )
    # The driver would work again, but nothing is given to it any more, and nobody waits.
    assert rig.collected(rig.store(Keys(digests(2, "late")), [1, 2], 1)) is False
    assert rig.table.match(Keys(digests(2, "late")), 0, 2) == (0, None)


def test_pieces_of_one_pitch_go_as_one_2d_copy_a_run(
    make_instance: Callable[..., Instance],
) -> None:
    memory = FakeMemory(slab=True)
    rig = Rig(make_instance(host_slots=SLOTS), memory)
    rig.start()
    rig.stored("a", range(8))
    calls = backend(rig).statistics()["calls"]
    rig.close()
    assert calls == 1


def test_a_2d_copy_that_the_driver_refuses_is_done_piece_by_piece(
    make_instance: Callable[..., Instance],
) -> None:
    memory = FakeMemory(slab=True)
    rig = Rig(make_instance(host_slots=SLOTS), memory)
    memory.cuda.fail("cuMemcpy2DAsync", error=1)
    rig.start()
    keys = rig.stored("a", range(8))
    assert rig.loaded(keys, range(20, 28)) is True
    assert memory.read(27) == content(7)
    rig.close()


def test_methods_out_of_bounds_are_refused(rig: Rig) -> None:
    device = rig.copies._cuda
    assert device is not None
    with pytest.raises(ValueError, match="methods"):
        CudaBackend(device, [], [])
