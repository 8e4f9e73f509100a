# SPDX-License-Identifier: Apache-2.0
"""Histories of blocks, made by many processes, are linearizable; those that are not are named."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest

from tests.fast.instances import instance
from tests.fast.probe import load_probe
from tests.stress.histories import BLOCKS, leader_of, names, record
from tests.stress.linearizable import Op, check

SEED = int(os.environ.get("KVBM_STRESS_SEED", "1"))
PROCESSES = 4
STEPS = 2500
A, B = "aa", "bb"


def op(start: int, end: int, kind: str, **what: Any) -> Op:
    """An operation of leader 0 on block 0, at generation 0, under digest A."""
    usual = Op(start, end, leader=0, kind=kind, block=0, generation=0, digest=A)
    return usual._replace(**what)


STORED = (op(0, 1, "reserved"), op(2, 3, "published"), op(4, 5, "unpinned"))


# ---- the judge -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "more",
    [
        (op(6, 7, "found"), op(8, 9, "pinned", leader=1), op(10, 11, "unpinned", leader=1)),
        (op(6, 7, "evicted"), op(8, 9, "reserved", generation=1, digest=B)),
        # At once: the pin came first, or the eviction did.
        (op(6, 20, "pinned", leader=1), op(7, 9, "found"), op(10, 11, "unpinned", leader=1)),
        (op(6, 20, "not pinned", leader=1), op(7, 19, "evicted")),
        (op(6, 20, "evicted"), op(7, 8, "found"), op(9, 19, "missed", block=-1)),
        (op(6, 9, "counted"), op(7, 20, "uncounted"), op(21, 22, "evicted")),
        (op(6, 7, "published before"), op(8, 9, "not abandoned")),
    ],
)
def test_a_history_that_has_an_order_is_accepted(more: tuple[Op, ...]) -> None:
    assert check([*STORED, *more]) is None


@pytest.mark.parametrize(
    "more",
    [
        (op(6, 7, "evicted"), op(8, 9, "found")),
        (op(6, 7, "evicted"), op(8, 9, "pinned", leader=1)),
        (op(6, 7, "pinned", leader=1), op(8, 9, "evicted")),
        (op(6, 7, "not pinned", leader=1),),
        (op(6, 7, "counted"), op(8, 9, "evicted")),
        (op(6, 7, "reserved"),),
        (op(6, 7, "evicted"), op(8, 9, "reserved")),
        (op(6, 7, "evicted"), op(8, 9, "evicted")),
        (op(6, 9, "evicted"), op(7, 8, "evicted", leader=1)),
        (op(6, 7, "abandoned"),),
        (op(6, 7, "published"),),
        (op(6, 7, "found", digest=B),),
        (op(6, 7, "unpinned"),),
        (op(6, 7, "uncounted"),),
        (op(6, 7, "not counted"),),
        (op(6, 7, "missed", block=-1),),
        (op(6, 7, "missed", block=-1), op(8, 9, "evicted")),
    ],
)
def test_a_history_that_has_none_is_named(more: tuple[Op, ...]) -> None:
    found = check([*STORED, *more])
    assert found is not None
    assert found.op in more
    assert found.states


# ---- the blocks ----------------------------------------------------------------------------------
def history_of(seed: int) -> list[Op]:
    """Let processes work on a new segment, of fewer blocks than there are digests."""
    one = instance(host_slots=BLOCKS)
    try:
        history = record(one.name, PROCESSES, STEPS, seed)
        one.prove()
        return history
    finally:
        one.remove()


@pytest.mark.timeout(600)
def test_histories_of_blocks_are_linearizable(summary: list[str], scale: float) -> None:
    load_probe()  # compiled once, not by each process
    done: Counter[str] = Counter()
    for number in range(max(1, round(scale))):
        history = history_of(SEED + number)
        done.update(entry.kind for entry in history)
        violation = check(history)
        assert violation is None, violation
    assert min(done[kind] for kind in ("pinned", "evicted", "abandoned", "counted", "found")) > 0
    summary.append(
        f"histories: {done.total()} operations of {PROCESSES} processes on {BLOCKS} blocks, "
        f"{done['evicted']} evictions, 0 without an order"
    )


def test_a_leader_that_evicts_what_is_held_is_noticed() -> None:
    one = instance(host_slots=BLOCKS)
    try:
        good, wrong = leader_of(one.name, 1), leader_of(one.name, 2, careless=True)
        name = names()[0]
        for leader in (good, wrong):
            assert leader.probe.enter(leader.segment)
        good.store(name)
        block, _, _ = good.find(name.digest) or (-1, 0, 0)
        good.pin(block, name.digest)
        assert check(good.history + wrong.history) is None
        wrong.evict(block)
        found = check(good.history + wrong.history)
        assert found is not None
        assert found.op.kind == "evicted"
        for leader in (good, wrong):
            leader.probe.leave(leader.segment)
            leader.raw.close()
            leader.segment.close()
    finally:
        one.remove()
