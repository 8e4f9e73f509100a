# SPDX-License-Identifier: Apache-2.0
"""Copies through the staging buffer, with the simulated driver.

What every way of copying promises is in test_worker_loop.py and test_cuda_backend.py, which run
with the staging buffer, too; the kernel itself is tried on a real device, in tests/gpu.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import pytest

from kvbm._fast.cuda_backend import CudaBackend
from kvbm._fast.keys import Keys
from kvbm.transfer import method
from tests.copy_rig import CHUNK, LAYERS, SLOTS, FakeMemory, Rig, content
from tests.fast.instances import Instance, digests
from tests.leaks import wait_until

ILLEGAL_ADDRESS = 700
FILLED = 7
DESCENDING = [27, 26, 25, 24, 23, 22, 21, 20]
SCATTERED = [5, 30, 2, 9, 47, 0, 20, 33]


@pytest.fixture
def memory() -> FakeMemory:
    return FakeMemory(staged=True)


@pytest.fixture
def make_rig(make_instance: Callable[..., Instance]) -> Iterator[Callable[[FakeMemory], Rig]]:
    made: list[Rig] = []

    def make(memory: FakeMemory) -> Rig:
        made.append(Rig(make_instance(host_slots=SLOTS), memory))
        made[-1].start()
        return made[-1]

    yield make
    for rig in made:
        assert isinstance(rig.memory, FakeMemory)
        rig.memory.cuda.hold_kernel(0)
        rig.memory.cuda.hold_engine(False)
        rig.memory.cuda.run()
        rig.close()
        assert rig.memory.cuda.alive == 0


def counted(rig: Rig) -> dict[str, int]:
    assert isinstance(rig.copies.backend, CudaBackend)
    return rig.copies.backend.statistics()


def comes_back(rig: Rig, sources: Sequence[int], targets: Sequence[int]) -> bool:
    """Store blocks and load them elsewhere; whether the bytes are the same."""
    keys = rig.stored(("a", *sources), sources)
    assert rig.loaded(keys, targets) is True
    return [rig.memory.read(block) for block in targets] == [
        content(i) for i in range(len(targets))
    ]


def test_a_run_of_slots_is_one_copy_whatever_its_device_blocks_are(
    make_rig: Callable[[FakeMemory], Rig], memory: FakeMemory
) -> None:
    rig = make_rig(memory)
    assert comes_back(rig, SCATTERED, DESCENDING)
    found = counted(rig)
    assert (found["kernels"], found["calls"], found["pieces"]) == (2, 4, 0)


def test_slots_that_come_back_from_eviction_in_descending_order_are_one_copy(
    make_rig: Callable[[FakeMemory], Rig], memory: FakeMemory
) -> None:
    rig = make_rig(memory)
    for seed in range(SLOTS // 8):
        rig.stored(seed, SCATTERED)
    before = counted(rig)
    keys = rig.stored("evicting", SCATTERED)
    after = counted(rig)
    assert after["kernels"] - before["kernels"] == 1
    assert after["calls"] - before["calls"] == 2
    assert rig.loaded(keys, DESCENDING) is True
    assert [memory.read(block) for block in DESCENDING] == [content(i) for i in range(8)]


def test_long_pieces_go_straight(
    make_rig: Callable[[FakeMemory], Rig], memory: FakeMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(method, "STAGED_BELOW_BYTES", 4 * CHUNK)
    rig = make_rig(memory)
    assert comes_back(rig, range(8), range(20, 28))  # one piece of eight chunks a layer
    assert counted(rig)["kernels"] == 0
    assert comes_back(rig, SCATTERED, DESCENDING)
    assert counted(rig)["kernels"] == 2


def test_a_bound_without_end_stages_everything(
    make_rig: Callable[[FakeMemory], Rig], memory: FakeMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(method, "STAGED_BELOW_BYTES", 2**63)
    rig = make_rig(memory)
    assert comes_back(rig, range(8), range(20, 28))
    assert counted(rig)["kernels"] == 2


def test_a_pitch_is_preferred(make_rig: Callable[[FakeMemory], Rig]) -> None:
    rig = make_rig(FakeMemory(slab=True, staged=True))
    assert comes_back(rig, SCATTERED, DESCENDING)
    assert counted(rig)["kernels"] == 0
    assert isinstance(rig.copies.backend, CudaBackend)
    assert rig.copies.backend.staging_bytes == 0


@pytest.mark.parametrize("symbol", ["cuMemAlloc", "cuModuleLoadData", "cuModuleGetFunction"])
def test_without_buffer_or_kernel_pieces_go_straight(
    make_rig: Callable[[FakeMemory], Rig],
    memory: FakeMemory,
    symbol: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    memory.cuda.fail(symbol, error=2)
    with caplog.at_level(logging.WARNING, "kvbm.cuda"):
        rig = make_rig(memory)
    assert symbol in caplog.text
    assert comes_back(rig, SCATTERED, DESCENDING)
    assert counted(rig)["kernels"] == 0
    assert counted(rig)["pieces"] == 2 * LAYERS * len(SCATTERED)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of two blocks."""
    monkeypatch.setattr(method, "CHUNK_BYTES", 2 * LAYERS * CHUNK)


@pytest.mark.usefixtures("small_chunks")
def test_an_operation_in_many_chunks_arrives_whole(
    make_rig: Callable[[FakeMemory], Rig], memory: FakeMemory
) -> None:
    rig = make_rig(memory)
    assert comes_back(rig, SCATTERED, DESCENDING)
    assert counted(rig)["kernels"] == 8


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("late", [1, 2, 3, 4])
def test_a_load_has_not_ended_before_all_of_its_kernels(
    make_rig: Callable[[FakeMemory], Rig], memory: FakeMemory, late: int
) -> None:
    rig = make_rig(memory)
    keys = rig.stored("a", SCATTERED)
    ref, handle = rig.load(keys, DESCENDING, 2)
    memory.cuda.hold_kernel(4 + late)  # the store had four; the last two end independently
    rig.loop.bind_step(2)
    assert wait_until(lambda: counted(rig)["kernels"] >= 4 + min(late + 1, 4))
    memory.cuda.run()
    assert not rig.loop.rank_ended(handle)
    memory.cuda.hold_kernel(0)
    assert rig.collected(handle) is True
    rig.table.unpin(ref)
    assert [memory.read(block) for block in DESCENDING] == [content(i) for i in range(8)]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("late", [1, 2, 3, 4])
def test_a_store_has_not_ended_before_all_of_its_kernels(
    make_rig: Callable[[FakeMemory], Rig], memory: FakeMemory, late: int
) -> None:
    rig = make_rig(memory)
    for i, block in enumerate(SCATTERED):
        memory.write(block, content(i))
    keys = Keys(digests(8))
    memory.cuda.hold_kernel(late)
    handle = rig.store(keys, SCATTERED, 1)
    rig.loop.fill_step(1)
    assert wait_until(lambda: counted(rig)["kernels"] >= late)
    memory.cuda.run()
    assert not rig.loop.rank_ended(handle)
    memory.cuda.hold_kernel(0)
    assert rig.collected(handle) is True
    assert rig.loaded(keys, DESCENDING) is True
    assert [memory.read(block) for block in DESCENDING] == [content(i) for i in range(8)]


@pytest.mark.usefixtures("small_chunks")
def test_each_chunk_of_a_store_reads_what_the_forward_pass_writes(
    make_rig: Callable[[FakeMemory], Rig], memory: FakeMemory
) -> None:
    rig = make_rig(memory)
    memory.cuda.hold_engine(True)
    for block in SCATTERED:
        memory.launch_fill(block, FILLED)
    keys = Keys(digests(8))
    handle = rig.store(keys, SCATTERED, 1)
    rig.loop.fill_step(1)
    assert wait_until(lambda: counted(rig)["kernels"] == 4)  # one a stream
    memory.cuda.run()
    memory.cuda.hold_engine(False)
    assert rig.collected(handle) is True
    assert rig.loaded(keys, DESCENDING) is True
    assert {memory.read(block) for block in DESCENDING} == {bytes([FILLED]) * (LAYERS * CHUNK)}


@pytest.mark.usefixtures("small_chunks")
def test_each_chunk_of_a_load_writes_after_the_last_owner_of_the_block(
    make_rig: Callable[[FakeMemory], Rig], memory: FakeMemory
) -> None:
    rig = make_rig(memory)
    keys = rig.stored("a", SCATTERED)
    memory.cuda.hold_engine(True)
    for block in DESCENDING:
        memory.launch_fill(block, FILLED)
    ref, handle = rig.load(keys, DESCENDING, 4)
    rig.loop.bind_step(4)
    assert wait_until(lambda: counted(rig)["kernels"] == 4 + 4)
    memory.cuda.run()
    memory.cuda.hold_engine(False)
    assert rig.collected(handle) is True
    rig.table.unpin(ref)
    assert [memory.read(block) for block in DESCENDING] == [content(i) for i in range(8)]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("symbol", ["cuLaunchKernel", "cuMemcpy2DAsync", "cuStreamWaitEvent"])
def test_an_error_in_any_chunk_fails_the_load_and_names_its_blocks(
    make_rig: Callable[[FakeMemory], Rig],
    memory: FakeMemory,
    symbol: str,
    after: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rig = make_rig(memory)
    keys = rig.stored("a", SCATTERED)
    ref, handle = rig.load(keys, DESCENDING, 2)
    memory.cuda.fail(symbol, error=ILLEGAL_ADDRESS, after=after)
    with caplog.at_level(logging.ERROR, "kvbm.cuda"):
        rig.loop.bind_step(2)
        assert rig.collected(handle) is False
    assert "CUDA_ERROR_SIMULATED" in caplog.text
    rig.table.unpin(ref)
    assert rig.loaded(keys, DESCENDING, 2) is True
    assert [memory.read(block) for block in DESCENDING] == [content(i) for i in range(8)]
