# SPDX-License-Identifier: Apache-2.0
"""Stop a process at its stores to shared memory, one after the other; run on a debug build.

``python -m tests.stress.stop_points`` prints a JSON summary. For n = 1, 1 + every, ... a forked
child runs the scenario of tests/stress/crash_points.py and stops (SIGSTOP) just before its n-th
store to shared memory. While it is stopped, the others look up, pin, reserve, publish, evict,
attach, claim, recover and leave, each in a bounded number of stores; then it is continued, comes to
its end, and all invariants hold. A second scenario stops a process that recovers: then nothing is
stored, everything else goes on, and nobody waits. In a third one it stores what the others store
meanwhile: wherever it was stopped, each digest is in one block afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import traceback
from collections.abc import Callable

from tests.stress.crash_points import (  # first: loads globally
    SURVIVOR,
    debug_word,
    recovering,
    scenario,
)

# isort: split
from kvbm._fast.control import census, evict_subtrees
from kvbm._fast.keys import Keys
from kvbm._fast.operation_table import OperationTable
from kvbm._fast.participants import claim_leader, find_leader, participants
from kvbm._fast.recovery import recover
from kvbm._fast.segment import Segment
from tests.fast.instances import Instance, digests, instance
from tests.fast.raw_segment import PARTIAL, REGISTERED

SLOTS = 28
"""So many that the stopped process cannot hold all that others need: ten."""
STORES_MAX = 2000
"""Bound of what the others may take for everything, in stores to shared memory; they need 400."""
HANGS_S = 60
THE_SAME = digests(6, "stored")
OURS, THEIRS = digests(3, "others"), digests(1, "newcomer")
ENGINE_KEY = 6


def go_on(table: OperationTable, name: str, stores: bool) -> None:
    """Everything that live participants do; `stores` says whether stores may be declined."""
    look_up(table)
    store(table, OURS, stores)
    newcomer = Segment.attach(name)
    claim_leader(newcomer, ENGINE_KEY)
    assert find_leader(newcomer, ENGINE_KEY) == newcomer.leader
    second = OperationTable(newcomer)
    reserve_the_same(second)
    look_up(second)
    store(second, THEIRS, stores)
    recover(newcomer, rebuild=True)
    census(newcomer, "host")
    assert any(line.alive and line.leader == newcomer.leader for line in participants(newcomer))
    newcomer.close()


def look_up(table: OperationTable) -> None:
    """Match the blocks of the survivor; after the scenario's reset nobody finds them."""
    count, ref = table.match(Keys(SURVIVOR), 0, len(SURVIVOR))
    assert count == (0 if table.segment.key_epoch else len(SURVIVOR))
    if ref is not None:
        assert len(table.slots_of(ref, count)) == count
        table.unpin(ref)


def reserve_the_same(table: OperationTable) -> None:
    """Publish what the stopped process stores, too, as far as it has not reserved it."""
    refs = [ref for ref, _ in table.reserve(Keys(THE_SAME), 0, len(THE_SAME))]
    registered = table.publish(refs)
    assert table.abandon_reserved(refs[registered:]) or not refs  # below a block that it fills
    for ref in refs:
        table.unpin(ref)


def store(table: OperationTable, hashes: list[bytes], may_store: bool) -> None:
    """Reserve, publish, match and evict a chain, or be declined at once."""
    keys = Keys(hashes)
    refs = [ref for ref, _ in table.reserve(keys, 0, len(hashes))]
    assert len(refs) == (len(hashes) if may_store else 0)
    assert table.publish(refs) == len(refs)
    for ref in refs:
        table.unpin(ref)
    count, ref = table.match(keys, 0, len(hashes))
    assert count == len(refs)
    if ref is not None:
        table.unpin(ref)
    assert evict_subtrees(table, refs[:1]) == len(refs)


def storing(name: str) -> None:
    """A process that stores what the others store at the same time."""
    segment = Segment.attach(name)
    claim_leader(segment, os.getpid())
    reserve_the_same(OperationTable(segment))
    segment.close()


def stopped_at(n: int, run: Callable[[], None]) -> int:
    """Fork a child that stops before its n-th store; its process id."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            debug_word("kv_crash_is_a_stop").value = 1
            debug_word("kv_crash_countdown").value = n
            run()
            status = 0
        finally:
            if status:
                traceback.print_exc()
            os._exit(status)
    return pid


def visit(n: int, run: Callable[[str], None], declines: bool) -> int | None:
    """Stop at store `n`; the stores that the others needed, None if the child came to its end."""
    one = instance(host_slots=SLOTS)
    stores = debug_word("kv_shared_store_count")
    needed = None
    try:
        table = one.leader(engine_key=5)
        held = [ref for ref, _ in table.reserve(Keys(SURVIVOR), 0, len(SURVIVOR))]
        table.publish(held)
        pid = stopped_at(n, lambda: run(one.name))
        _, status = os.waitpid(pid, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            before = stores.value
            signal.alarm(HANGS_S)
            try:
                go_on(table, one.name, not (declines and one.creator.recovering))
            finally:
                signal.alarm(0)
                os.kill(pid, signal.SIGCONT)
                _, status = os.waitpid(pid, 0)
            needed = stores.value - before
            assert needed <= STORES_MAX, f"store {n}: the others needed {needed} stores"
        assert os.waitstatus_to_exitcode(status) == 0, f"store {n}: ended with {status}"
        check(one, held, n)
        return needed
    finally:
        one.remove()


def check(one: Instance, held: list[int], n: int) -> None:
    """Nothing is lost, and what is left is whole."""
    recover(one.creator, rebuild=True)
    one.raw.check_invariants()
    blocks = one.raw.blocks()
    for ref in held:
        block = blocks[ref & 0xFFFFFFFF]
        assert block.state == REGISTERED, f"store {n}: a registered block was lost: {block}"
    live = [block.digest for block in blocks if block.state in (PARTIAL, REGISTERED)]
    assert len(live) == len(set(live)), f"store {n}: one digest is in two blocks"
    for index, block in enumerate(blocks):
        assert block.holders <= {0}, f"store {n}: block {index} is held: {block}"


def sweep(run: Callable[[str], None], declines: bool, every: int) -> tuple[int, int]:
    """Visit every so many stores of a scenario: how many, and the most that the others needed."""
    visited = most = 0
    n = 1
    while (needed := visit(n, run, declines)) is not None:
        visited, most, n = visited + 1, max(most, needed), n + every
    return visited, most


def main() -> None:
    """Visit the points that the command line asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--every", type=int, default=1, help="visit one store in so many")
    every = parser.parse_args().every
    points, most = sweep(lambda name: scenario(name, alone=False), False, every)
    recoveries, recovery_most = sweep(recovering, True, max(1, every // 8))
    same, same_most = sweep(storing, False, 1)
    print(
        json.dumps(
            {
                "stops": points,
                "in recovery": recoveries,
                "in an equal store": same,
                "stores": max(most, recovery_most, same_most),
            }
        )
    )


if __name__ == "__main__":
    main()
