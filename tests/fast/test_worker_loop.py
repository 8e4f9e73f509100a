# SPDX-License-Identifier: Apache-2.0
"""What a worker's loop promises, with every backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest

from kvbm._fast.keys import Keys
from kvbm._fast.worker_loop import WorkerLoop
from tests.copy_rig import SLOTS, DeviceMemory, FakeMemory, HostMemory, Rig, content
from tests.fast.instances import Instance, digests
from tests.gpu.memory import CudaMemory
from tests.leaks import wait_until

MEMORIES: dict[str, Callable[[], DeviceMemory]] = {
    "host": HostMemory,
    "cuda batches": FakeMemory,
    "cuda singly": lambda: FakeMemory(batches=False),
    "cuda pitched": lambda: FakeMemory(slab=True),
    "cuda staged": lambda: FakeMemory(staged=True),
}
ON_A_DEVICE: dict[str, Callable[[], DeviceMemory]] = {
    "device, one tensor a layer": CudaMemory,
    "device, one slab": lambda: CudaMemory(slab=True),
    "device, staged": lambda: CudaMemory(staged=True),
}
SCATTERED = [5, 6, 7, 30, 2, 9, 10, 47, 0, 20]


@pytest.fixture(
    params=[*MEMORIES, *(pytest.param(name, marks=pytest.mark.gpu) for name in ON_A_DEVICE)]
)
def rig(request: pytest.FixtureRequest, make_instance: Callable[..., Instance]) -> Iterator[Rig]:
    memory = (MEMORIES | ON_A_DEVICE)[request.param]()
    made = Rig(make_instance(host_slots=SLOTS), memory)
    yield made
    made.close()
    if isinstance(memory, FakeMemory):
        assert memory.cuda.alive == 0


def ended_ns(rig: Rig, handle: int) -> int:
    """Time at which an operation ended."""
    return rig.raw.u64(rig.raw.operation_at(rig.table.segment.leader or 0, handle & 0xFFFF) + 40)


def test_a_chain_comes_back_as_it_was_stored(rig: Rig) -> None:
    rig.start()
    keys = rig.stored("a", SCATTERED)
    targets = [40, 41, 42, 11, 12, 33, 34, 35, 36, 1]
    assert rig.loaded(keys, targets) is True
    assert [rig.memory.read(block) for block in targets] == [content(i) for i in range(10)]


def test_a_store_writes_its_own_slots_alone(rig: Rig) -> None:
    rig.start()
    first = rig.stored("a", [1, 2, 3])
    second = rig.stored("b", [4, 5])
    assert rig.loaded(first, [30, 31, 32]) is True
    assert rig.loaded(second, [33, 34]) is True
    assert rig.memory.read(32) == content(2)
    assert rig.memory.read(34) == content(1)


def test_a_store_waits_until_its_step_is_filled(rig: Rig) -> None:
    rig.start()
    keys = Keys(digests(2))
    handle = rig.store(keys, [1, 2], 3)
    rig.loop.bind_step(3)
    rig.loop.fill_step(2)
    other = rig.store(Keys(digests(1, "other")), [3], 2)  # behind it in the queue
    assert rig.table.collect(handle) is None
    assert rig.table.collect(other) is None
    rig.memory.write(1, content(11))
    rig.memory.write(2, content(12))
    rig.loop.fill_step(3)
    assert rig.collected(handle) is True
    assert rig.collected(other) is True
    assert rig.loaded(keys, [8, 9], 3) is True
    assert [rig.memory.read(8), rig.memory.read(9)] == [content(11), content(12)]


def test_binding_a_step_means_that_the_step_before_is_filled(rig: Rig) -> None:
    rig.start()
    handle = rig.store(Keys(digests(1)), [1], 3)
    rig.loop.bind_step(4)
    assert rig.collected(handle) is True


def test_a_load_waits_until_its_step_is_bound(rig: Rig) -> None:
    rig.start()
    keys = rig.stored("a", [1])
    ref, handle = rig.load(keys, [2], 5)
    rig.loop.bind_step(4)
    # What is queued behind it and may run is not overtaken: it ends after the load.
    later_ref, later = rig.load(keys, [3], 4)
    assert not wait_until(lambda: rig.loop.rank_ended(handle), 0.05)
    rig.loop.bind_step(5)
    assert rig.collected(handle) is True
    assert rig.collected(later) is True
    rig.table.unpin(ref)
    rig.table.unpin(later_ref)
    assert rig.memory.read(2) == rig.memory.read(3) == content(0)


def test_a_step_number_never_goes_back(rig: Rig) -> None:
    rig.start()
    rig.loop.bind_step(9)
    rig.loop.bind_step(3)
    handle = rig.store(Keys(digests(1)), [1], 8)
    assert rig.collected(handle) is True


def test_an_operation_that_is_cancelled_before_it_begins_copies_nothing(rig: Rig) -> None:
    keys = Keys(digests(3))
    handle = rig.store(keys, [1, 2, 3], 2)
    rig.table.cancel(handle)
    assert rig.loop.rank_ended(handle)
    assert rig.table.collect(handle) is False
    rig.start()
    rig.loop.fill_step(2)
    assert rig.collected(rig.store(Keys(digests(1, "next")), [4], 2)) is True
    assert rig.table.match(keys, 0, 3) == (0, None)
    assert (rig.headers["word"] != 0).sum() == 1  # that of the next one


def test_a_stale_entry_of_the_ring_is_passed_over(rig: Rig) -> None:
    stale = rig.store(Keys(digests(1, "stale")), [1], 1)
    rig.table.cancel(stale)
    assert rig.table.collect(stale) is False
    again = rig.store(Keys(digests(1, "again")), [1], 1)
    rig.start()
    rig.loop.fill_step(1)
    assert rig.collected(again) is True
    assert rig.loop.rank_ended(stale)
    assert rig.loop.failed_device_blocks(stale) == []


def test_a_load_of_a_slot_that_holds_something_else_fails_from_that_row_on(rig: Rig) -> None:
    rig.start()
    keys = rig.stored("a", [1, 2, 3, 4, 5])
    slots = {int(header["block"]): slot for slot, header in enumerate(rig.headers)}
    count, ref = rig.table.match(keys, 0, 3)
    assert count == 3
    assert ref is not None
    rig.table.unpin(ref)
    rig.headers["digest_lo"][slots[ref & 0xFFFFFFFF]] ^= 1
    ref, handle = rig.load(keys, [20, 21, 22, 23, 24], 2)
    rig.loop.bind_step(2)
    assert wait_until(lambda: rig.loop.rank_ended(handle))
    assert rig.loop.failed_device_blocks(handle) == [22, 23, 24]
    assert rig.collected(handle) is False
    rig.table.unpin(ref)
    assert rig.memory.read(21) == content(1)


def test_a_store_whose_reservation_is_gone_fails_and_is_not_published(rig: Rig) -> None:
    keys = Keys(digests(2))
    handle = rig.store(keys, [1, 2], 1)
    at = rig.raw.operation_at(rig.table.segment.leader or 0, handle & 0xFFFF) + 192 + 12
    with type(rig.raw)(rig.name, writable=True) as writable:
        writable.put_u32(at + 32, writable.u32(at + 32) + 1)  # generation of the second row
    rig.start()
    rig.loop.fill_step(1)
    assert wait_until(lambda: rig.loop.rank_ended(handle))
    assert rig.loop.failed_device_blocks(handle) == [2]
    with type(rig.raw)(rig.name, writable=True) as writable:
        writable.put_u32(at + 32, writable.u32(at + 32) - 1)
    assert rig.collected(handle) is False
    assert rig.table.match(keys, 0, 2) == (0, None)


def test_stop_ends_the_thread_while_operations_wait(rig: Rig) -> None:
    rig.start()
    handle = rig.store(Keys(digests(1)), [1], 7)
    rig.stop()
    assert not rig.loop.rank_ended(handle)
    rig.table.cancel(handle)
    assert rig.table.collect(handle) is False


def test_all_operations_of_a_leader_can_be_in_the_ring(rig: Rig) -> None:
    keys = [Keys(digests(1, i)) for i in range(SLOTS)]
    handles = [rig.store(key, [i], 1) for i, key in enumerate(keys)]
    rig.loop.fill_step(1)
    rig.start()
    assert [rig.collected(handle) for handle in handles] == [True] * SLOTS


def test_operations_of_a_kind_end_in_the_order_in_which_they_were_submitted(rig: Rig) -> None:
    handles = [rig.store(Keys(digests(2, i)), [2 * i, 2 * i + 1], 1) for i in range(8)]
    rig.loop.fill_step(1)
    rig.start()
    assert all(wait_until(lambda h=handle: rig.loop.rank_ended(h)) for handle in handles)
    times = [ended_ns(rig, handle) for handle in handles]
    assert all(a <= b for a, b in pairwise(times))
    assert [rig.collected(handle) for handle in handles] == [True] * 8


def test_loads_go_before_stores_that_came_earlier(make_instance: Callable[..., Instance]) -> None:
    rig = Rig(make_instance(host_slots=SLOTS), HostMemory())
    rig.start()
    keys = rig.stored("a", [1, 2])
    rig.stop()
    rig.loop = WorkerLoop(rig.segment, rig.copies.backend)
    store = rig.store(Keys(digests(2, "new")), [3, 4], 1)
    ref, load = rig.load(keys, [5, 6], 1)
    rig.loop.bind_step(1)
    rig.start()
    assert wait_until(lambda: rig.loop.rank_ended(store) and rig.loop.rank_ended(load))
    assert ended_ns(rig, load) < ended_ns(rig, store)
    assert (rig.collected(load), rig.collected(store)) == (True, True)
    rig.table.unpin(ref)
    rig.close()


def test_what_was_cancelled_can_be_overwritten_when_the_wait_is_over(rig: Rig) -> None:
    rig.start()
    handle = rig.store(Keys(digests(3)), [1, 2, 3], 4)
    assert rig.loop.cancel_and_wait(handle, 1000)
    assert rig.loop.rank_ended(handle)
    assert rig.collected(handle) is False


def test_what_no_thread_will_begin_fails_and_is_no_cancel(rig: Rig) -> None:
    handle = rig.store(Keys(digests(3)), [1, 2, 3], 1)
    rig.loop.fail(handle)
    rig.loop.fail(handle)  # has ended: nothing happens
    assert rig.loop.rank_ended(handle)
    assert rig.collected(handle) is False
    counters = rig.segment.counters()
    assert (counters["stores_failed"], counters["stores_cancelled"]) == (1, 0)


def test_a_scribbled_block_is_found_by_its_checksum(
    make_instance: Callable[..., Instance],
) -> None:
    for make in MEMORIES.values():
        rig = Rig(make_instance(host_slots=SLOTS), make(), checksum=True)
        rig.start()
        keys = rig.stored("a", [1, 2, 3])
        assert rig.loaded(keys, [11, 12, 13]) is True
        used = int((rig.headers["word"] >> 60 == 2).argmax())
        at = rig.layout.offset(used, 1)
        rig.arena[at] ^= 0xFF
        assert rig.loaded(keys, [21, 22, 23]) is False
        rig.close()


def test_a_segment_without_a_worker_line_is_refused(rig: Rig) -> None:
    with pytest.raises(ValueError, match="claim_worker"):
        WorkerLoop(rig.table.segment, rig.copies.backend)


def test_a_handle_out_of_bounds_is_refused(rig: Rig) -> None:
    with pytest.raises(IndexError, match="outside"):
        rig.loop.rank_ended(1000)
