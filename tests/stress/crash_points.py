# SPDX-License-Identifier: Apache-2.0
"""Crash at every store to shared memory, one after the other; run on a debug build.

``python -m tests.stress.crash_points`` prints a JSON summary. For n = 1, 2, ... a forked child runs
a fixed scenario and ends, without any clean-up, just before its n-th store to shared memory
(kvbm/_fast/atomics.h); the parent then recovers and checks every invariant. It is over when a child
reaches the scenario's end. Then the same for what is done to a disk tier's table alone, and for a
process that recovers what another dead one has held.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable

sys.setdlopenflags(os.RTLD_NOW | os.RTLD_GLOBAL)  # one countdown for all extension modules

import numpy as np  # noqa: E402

from kvbm._fast import segment as segment_module  # noqa: E402
from kvbm._fast.control import evict_subtrees, identify  # noqa: E402
from kvbm._fast.copy import HostCopier  # noqa: E402
from kvbm._fast.disk_table import DiskTable, raise_epoch  # noqa: E402
from kvbm._fast.host_backend import HostBackend  # noqa: E402
from kvbm._fast.keys import Keys  # noqa: E402
from kvbm._fast.operation_table import OperationTable  # noqa: E402
from kvbm._fast.participants import claim_leader, claim_worker  # noqa: E402
from kvbm._fast.recovery import recover  # noqa: E402
from kvbm._fast.segment import Segment  # noqa: E402
from kvbm._fast.worker_loop import WorkerLoop  # noqa: E402
from kvbm.transfer.arena_layout import ArenaLayout  # noqa: E402
from tests.fast.instances import Instance, digests, instance  # noqa: E402
from tests.fast.raw_segment import PARTIAL, REGISTERED  # noqa: E402
from tests.fast.test_disk_table import headers_of  # noqa: E402

CRASHED = 86
SLOTS = 12
CHUNK = 64
SURVIVOR = digests(4, "survivor")


def debug_word(name: str) -> ctypes.c_uint64:
    """A variable of the debug build (kvbm/_fast/atomics.h)."""
    return ctypes.c_uint64.in_dll(ctypes.CDLL(segment_module.__file__), name)


def settle(table: OperationTable, handles: list[int]) -> None:
    """Wait until operations have ended, and collect them."""
    deadline = time.monotonic() + 30
    while handles:
        handles = [h for h in handles if table.collect(h) is None]
        assert time.monotonic() < deadline


def scenario(name: str, alone: bool = True) -> None:
    """Every transition: reserve, publish, evict, abandon, store, load, cancel, reset, leave.

    Not `alone` means that others store meanwhile, and may evict what nobody holds.
    """
    mine, theirs = Segment.attach(name), Segment.attach(name)
    leader = claim_leader(mine, os.getpid())
    claim_worker(theirs, leader, 0)
    table = OperationTable(mine)
    memory = np.zeros((16, CHUNK), dtype=np.uint8)
    layout = ArenaLayout(SLOTS, (CHUNK,))
    arena = np.zeros(layout.total_bytes // 8, dtype=np.uint64)
    copier = HostCopier([(memory.ctypes.data, CHUNK, CHUNK)], layout, arena, device_blocks=16)
    loop = WorkerLoop(theirs, HostBackend([copier]))
    copies = threading.Thread(target=loop.run)
    copies.start()
    chain = Keys(digests(5, "chain"))
    reserved = [ref for ref, _ in table.reserve(chain, 0, 4)]
    table.publish(reserved[:3])
    table.abandon_reserved(reserved[3:])
    for ref in reserved[:3]:
        table.unpin(ref)
    for ref, _ in table.reserve(Keys(digests(1, "anonymous")), 0, 1):
        identify(table, ref, Keys(digests(1, "named late")), 0)
        table.publish([ref])
        table.unpin(ref)
        evict_subtrees(table, [ref])
    handles, _, _ = table.store(Keys(digests(6, "stored")), 0, 6, list(range(6)), None, 1)
    loop.bind_step(1)
    loop.fill_step(1)
    settle(table, handles)
    count, ref = table.match(Keys(digests(6, "stored")), 0, 6)
    assert count == 6 or not alone
    if ref is not None:
        settle(table, table.load(ref, 0, list(range(6, 6 + count)), 1) or [])
        table.unpin(ref)
    handles, _, _ = table.store(Keys(digests(3, "stopped")), 0, 3, [0, 1, 2], None, 9)
    for handle in handles:
        table.cancel(handle)
    settle(table, handles)
    handles, _, _ = table.store(Keys(digests(9, "evicts")), 0, 9, list(range(9)), None, 2)
    loop.bind_step(3)
    settle(table, handles)
    table.reset()
    loop.stop()
    copies.join()
    theirs.close()
    mine.close()


def on_disk(name: str) -> None:
    """Restore, write a run, publish and give back, retire, keep a slot, reset."""
    segment = Segment.attach(name)
    claim_leader(segment, os.getpid())
    table = DiskTable(segment)
    found, chain = Keys(digests(4, "found")), Keys(digests(5, "chain"))
    free = [slot for slot in range(SLOTS) if slot not in range(len(SURVIVOR))]
    assert table.restore(headers_of(found, free[:4])) == 4
    count, ref = table.match(found, 0, 4)
    assert (count, ref is not None) == (4, True)
    if ref is not None:
        table.unpin(ref)
    reserved = [ref for ref, _ in table.reserve_run(chain, 0, 4, None)]
    table.publish(reserved[:3])
    table.abandon_reserved(reserved[3:])
    for ref in reversed(reserved[:3]):
        table.unpin(ref)
    done, kept = table.retire(found, 1)
    assert done
    if kept is not None:
        table.abandon_reserved([kept])
    raise_epoch(table, table.segment.key_epoch + 1)
    table.reset()
    segment.close()


def recovering(name: str) -> None:
    """A process that recovers what another one, which died, has held."""
    pid = os.fork()
    if pid == 0:
        debug_word("kv_crash_countdown").value = 0
        dead = Segment.attach(name)
        claim_leader(dead, os.getpid())
        table = OperationTable(dead)
        refs = [ref for ref, _ in table.reserve(Keys(digests(3, "dead")), 0, 3)]
        table.publish(refs[:1])
        table.store(Keys(digests(2, "dead too")), 0, 2, [0, 1], None, 1)
        os._exit(0)
    os.waitpid(pid, 0)
    segment = Segment.attach(name)
    recover(segment, rebuild=True)
    segment.close()


def prepare(one: Instance) -> list[int]:
    """Blocks of a leader that lives on: held, so that nothing may take them away."""
    table = one.leader(engine_key=5)
    refs = [ref for ref, _ in table.reserve(Keys(SURVIVOR), 0, len(SURVIVOR))]
    table.publish(refs)
    return refs


def visit(n: int, run: Callable[[str], None]) -> bool:
    """Crash at store `n` and check what is left; False if the scenario came to its end."""
    one = instance(host_slots=SLOTS)
    try:
        held = prepare(one)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                debug_word("kv_crash_countdown").value = n
                run(one.name)
                status = 0
            finally:
                if status:
                    traceback.print_exc()
                os._exit(status)
        _, wait_status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(wait_status)
        assert code in (0, CRASHED), f"store {n}: the scenario failed with {code}"
        recover(one.creator, rebuild=True)
        one.raw.check_invariants()
        blocks = one.raw.blocks()
        for ref in held:
            block = blocks[ref & 0xFFFFFFFF]
            assert block.state == REGISTERED, f"store {n}: a registered block was lost: {block}"
            assert block.holders == frozenset({0}), f"store {n}: {block}"
        for index, block in enumerate(blocks):
            assert block.holders <= {0}, f"store {n}: block {index} is held by the dead: {block}"
            assert block.state != PARTIAL, f"store {n}: block {index} is half done: {block}"
        return code == CRASHED
    finally:
        one.remove()


def sweep(run: Callable[[str], None]) -> int:
    """Visit all crash points of a scenario; how many there are."""
    n = 0
    while visit(n + 1, run):
        n += 1
    return n


def main() -> None:
    """Visit all crash points of all scenarios."""
    found = {
        "crash_points": sweep(scenario),
        "on disk": sweep(on_disk),
        "in recovery": sweep(recovering),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
