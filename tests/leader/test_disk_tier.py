# SPDX-License-Identifier: Apache-2.0
"""The flow between host and disk, with real slabs: what is written, what comes back."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import kvbm.leader.disk_tier
import kvbm.worker.disk
from kvbm._fast.disk_batches import DiskBatches
from kvbm._fast.keys import Keys
from kvbm._fast.segment import Segment
from kvbm._fast.slab import SLAB_HEADER
from kvbm.instance import remove
from kvbm.leader.arrivals import TOKENS_MIN
from kvbm.leader.rates import SAMPLES_MIN
from kvbm.tiers.disk import PAGE_BYTES, read_slab, slab_path
from tests.disk_engine import (
    BLOCKS,
    HOST,
    TARGETS,
    ask,
    counters,
    disk_engines,
    expected,
    load,
    settle,
    spill,
    tier,
)
from tests.disk_rig import Calls
from tests.fast.instances import digests
from tests.leaks import wait_until
from tests.small_engine import BLOCK_TOKENS, SmallEngine


@pytest.fixture
def make_engine(tmp_path: Path) -> Iterator[Callable[..., SmallEngine]]:
    """Make engines with a disk tier."""
    yield from disk_engines(tmp_path)


@pytest.fixture
def engine(make_engine: Callable[..., SmallEngine]) -> SmallEngine:
    """A private engine that writes every block to disk."""
    return make_engine()


# ---- there and back ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options", [{}, {"ranks": 2}, {"groups": 2}], ids=["1", "2 ranks", "2 groups"]
)
def test_a_chain_that_left_the_host_tier_comes_back_from_disk(
    make_engine: Callable[..., SmallEngine], options: dict[str, int]
) -> None:
    engine = make_engine(host_slots=HOST * options.get("groups", 1), **options)
    spill(engine, value=7)
    assert engine.leader.match(engine.track("probe", 8, "a"), 0, 8) == 0
    assert ask(engine, "r", "a") == len(BLOCKS)
    assert counters(engine)["blocks_loaded"] == len(BLOCKS) * options.get("groups", 1)
    assert load(engine, "r", len(BLOCKS)) == expected(7)
    for rank in range(engine.ranks):
        assert engine.values(TARGETS, rank) == expected(7)


def test_only_requests_are_counted_as_look_ups_of_the_disk(engine: SmallEngine) -> None:
    spill(engine)
    counted = ("lookups", "lookup_blocks", "matched_blocks")
    assert [counters(engine)[name] for name in counted] == [0, 0, 0]
    assert ask(engine, "r", "a") == len(BLOCKS)
    assert [counters(engine)[name] for name in counted] == [1, 8, 8]


def test_reads_of_a_chain_may_end_in_any_order(
    make_engine: Callable[..., SmallEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, gate = Calls(), threading.Event()
    monkeypatch.setattr(kvbm.leader.disk_tier, "BATCH_BLOCKS", 2)
    with_calls = functools.partial(DiskBatches, calls=calls.addresses)
    monkeypatch.setattr(kvbm.worker.disk, "DiskBatches", with_calls)
    engine = make_engine()
    spill(engine, value=3)
    own = tier(engine)
    assert own.disk is not None
    _, ref = own.disk.match(Keys(digests(len(BLOCKS), "a")), 0, len(BLOCKS))
    assert ref is not None
    first = SLAB_HEADER.itemsize * own.disk.slots_of(ref, len(BLOCKS))[0] + PAGE_BYTES
    own.disk.unpin(ref)

    def held_up(at: int, _fd: int) -> None:
        if at == first:
            assert gate.wait(20)

    calls.faults["read"] = held_up
    sequence = engine.track("r", len(BLOCKS), "a")
    assert engine.leader.look_up(sequence, 0, len(BLOCKS)) is None
    handles = [handle for fetch in own._fetches for handle in fetch.handles]
    loop = engine.workers[0].loop
    assert loop is not None
    assert len(handles) == len(BLOCKS) // 2
    assert wait_until(lambda: all(loop.rank_ended(handle) for handle in handles[1:]))
    assert engine.leader.look_up(sequence, 0, len(BLOCKS)) is None
    gate.set()
    engine.run_until(lambda: engine.leader.look_up(sequence, 0, len(BLOCKS)) == len(BLOCKS))
    assert load(engine, "r", len(BLOCKS)) == expected(3)


def test_a_slow_disk_leaves_half_of_the_host_tier_to_new_blocks(
    make_engine: Callable[..., SmallEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, gate = Calls(), threading.Event()
    with_calls = functools.partial(DiskBatches, calls=calls.addresses)
    monkeypatch.setattr(kvbm.worker.disk, "DiskBatches", with_calls)
    engine = make_engine()
    calls.faults["write"] = lambda *_: None if gate.wait(20) else 0
    sizes = {"a": 8, "b": 4, "c": 4}
    for seed, count in sizes.items():
        engine.store(f"store {seed}", BLOCKS[:count], seed)
        engine.step()
        engine.step()
    kept = {s: engine.leader.match(engine.track(s, n, s), 0, n) for s, n in sizes.items()}
    gate.set()
    for seed in sizes:
        engine.leader.abandon(seed)
    settle(engine)
    assert kept == {"a": 8, "b": 0, "c": 4}  # `a` is being written, `b` had to give way


def test_what_came_back_stays_in_the_host_tier(engine: SmallEngine) -> None:
    spill(engine)
    ask(engine, "r", "a")
    engine.leader.abandon("r")
    reads = counters(engine)["loads"]
    assert ask(engine, "s", "a") == len(BLOCKS)
    assert counters(engine)["loads"] == reads


def test_what_is_on_disk_is_not_written_again(engine: SmallEngine) -> None:
    spill(engine)
    written = counters(engine)["blocks_stored"]
    ask(engine, "r", "a")
    engine.leader.abandon("r")
    engine.store("again", BLOCKS, "a")
    settle(engine)
    assert counters(engine)["blocks_stored"] == written


def test_a_chain_of_which_the_host_has_a_part_is_completed(engine: SmallEngine) -> None:
    spill(engine, value=3)
    assert ask(engine, "short", "a", 3) == 3
    assert engine.leader.sequences["short"].promoted_blocks(3) == 3
    engine.leader.abandon("short")
    before = counters(engine)["blocks_loaded"]
    assert ask(engine, "r", "a") == len(BLOCKS)
    assert counters(engine)["blocks_loaded"] == before + len(BLOCKS) - 3
    assert load(engine, "r", len(BLOCKS)) == expected(3)
    sequence = engine.leader.sequences["r"]
    assert sequence.promoted_blocks(len(BLOCKS)) == len(BLOCKS) - 3
    assert sequence.promoted_blocks(2) == 0, "these were in the host tier"
    sequence.new_admission()
    assert sequence.promoted_blocks(len(BLOCKS)) == 0


def test_blocks_before_the_devices_own_prefix_come_too(engine: SmallEngine) -> None:
    spill(engine, value=3)
    sequence = engine.track("r", 8, "a")
    engine.run_until(lambda: engine.leader.look_up(sequence, 4, 8) is not None)
    assert engine.leader.look_up(sequence, 4, 8) == 4
    engine.leader.drop_match(sequence)
    assert engine.leader.match(sequence, 0, 8) == 8


def test_two_requests_for_one_chain_read_it_once(engine: SmallEngine) -> None:
    spill(engine)
    first, second = (engine.track(name, 8, "a") for name in ("r", "s"))
    assert engine.leader.look_up(first, 0, 8) is None
    engine.leader.look_up(second, 0, 8)  # waits for the same, or finds it already
    engine.run_until(lambda: engine.leader.look_up(first, 0, 8) is not None)
    engine.run_until(lambda: engine.leader.look_up(second, 0, 8) is not None)
    assert engine.leader.look_up(second, 0, 8) == 8
    assert counters(engine)["blocks_loaded"] == 8


def test_a_host_tier_smaller_than_the_chain_takes_its_begin(
    make_engine: Callable[..., SmallEngine],
) -> None:
    engine = make_engine(host_slots=16)
    engine.store("a", list(range(10)), "a", 1)
    settle(engine)
    engine.store("b", list(range(10, 26)), "b", 100)
    settle(engine)
    busy = engine.track("busy", 16, "b")
    assert engine.leader.match(busy, 0, 16) == 16  # the host tier is full, and held
    assert ask(engine, "r", "a", 10) == 0
    engine.leader.drop_match(busy)
    engine.leader.abandon("r")
    assert ask(engine, "s", "a", 10) == 10


# ---- what is written -----------------------------------------------------------------------------
def test_the_filter_lets_a_block_pass_at_its_second_use(
    make_engine: Callable[..., SmallEngine],
) -> None:
    engine = make_engine(disable_disk_offload_filter=False)
    engine.store("first", BLOCKS, "a")
    settle(engine)
    assert counters(engine)["blocks_stored"] == 0
    assert ask(engine, "second", "a", 5) == 5  # found in the host tier: used again
    engine.leader.abandon("second")
    settle(engine)
    assert counters(engine)["blocks_stored"] == 5


def test_a_question_that_is_asked_again_counts_once(
    make_engine: Callable[..., SmallEngine],
) -> None:
    engine = make_engine(disable_disk_offload_filter=False)
    sequence = engine.track("r", 8, "a")
    engine.place(sequence, BLOCKS)
    engine.leader.store(sequence, 8)
    engine.step(lambda: engine.fill(BLOCKS))
    engine.run_until(lambda: engine.leader.look_up(sequence, 0, 8) == 8)
    for _ in range(3):
        assert engine.leader.look_up(sequence, 0, 8) == 8
        engine.step()
    settle(engine)
    assert counters(engine)["blocks_stored"] == 0


def test_a_write_budget_is_kept(make_engine: Callable[..., SmallEngine]) -> None:
    engine = make_engine()
    bytes_per_block = tier(engine).flow.block_bytes
    engine.close()
    per_day = 5.5 * bytes_per_block * 24 / 1e9  # an hour's worth at once: five blocks
    engine = make_engine(disk_write_budget_gb_per_day=per_day)
    spill(engine)
    assert counters(engine)["blocks_stored"] == 5


def test_a_full_disk_tier_evicts(make_engine: Callable[..., SmallEngine]) -> None:
    engine = make_engine(disk_cache_override_num_blocks=28)  # a spill writes 24 at most
    for number in range(5):
        spill(engine, number, 10 * number)
    assert counters(engine)["evicted"] > 0
    assert ask(engine, "r", 4) == len(BLOCKS)
    assert load(engine, "r", len(BLOCKS)) == expected(40)


# ---- what is not worth it ------------------------------------------------------------------------
def test_a_disk_that_is_slower_than_computing_is_not_read(engine: SmallEngine) -> None:
    spill(engine)
    own = tier(engine)
    own.reads.bytes_per_sec, own.reads._samples = 1.0, SAMPLES_MIN
    own.prefill.tokens_per_sec = 1e6
    assert ask(engine, "r", "a") == 0
    assert counters(engine)["loads"] == 0
    engine.leader.abandon("r")
    own.prefill.tokens_per_sec = 1e-6
    assert ask(engine, "s", "a") == len(BLOCKS)


def test_all_reads_of_a_request_are_measured_together(
    engine: SmallEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvbm.leader.disk_tier, "BATCH_BLOCKS", 2)
    spill(engine)
    assert ask(engine, "r", "a") == len(BLOCKS)
    reads = tier(engine).reads
    assert counters(engine)["loads"] == len(BLOCKS) // 2
    assert (reads._samples, reads._sampled_bytes) == (
        1,
        len(BLOCKS) * tier(engine).flow.block_bytes,
    )


# ---- restart -------------------------------------------------------------------------------------
def test_a_restart_without_shared_memory_finds_the_slab(
    make_engine: Callable[..., SmallEngine],
) -> None:
    name = f"disk-tier-{os.getpid()}"
    engine = make_engine(instance=name)
    spill(engine, value=9)
    engine.close()
    remove(name)
    again = make_engine(instance=name)
    assert ask(again, "r", "a") == len(BLOCKS)
    assert load(again, "r", len(BLOCKS)) == expected(9)


def test_a_restart_with_shared_memory_reads_what_was_not_published(
    make_engine: Callable[..., SmallEngine], tmp_path: Path
) -> None:
    name = f"disk-tier-{os.getpid()}"
    engine = make_engine(instance=name)
    engine.store("r", BLOCKS, "a", 4)
    path = slab_path(tmp_path, name, 0)

    def written() -> bool:
        found = read_slab(path)
        return found is not None and len(found[1]) == len(BLOCKS)

    engine.run_until(lambda: tier(engine)._spills)
    assert wait_until(written)  # on disk; the leader has not looked since
    engine.close()
    again = make_engine(instance=name)
    assert again.leader.disk is not None
    again.leader.reset()  # of the host tier's content nothing is left; neither of the disk's
    assert ask(again, "r", "a") == 0


def test_a_reset_holds_also_after_a_restart_without_shared_memory(
    make_engine: Callable[..., SmallEngine],
) -> None:
    name = f"disk-tier-{os.getpid()}"
    engine = make_engine(instance=name)
    spill(engine)
    engine.leader.reset()
    assert ask(engine, "r", "a") == 0
    spill(engine, "b", 5)
    engine.close()
    remove(name)
    again = make_engine(instance=name)
    assert ask(again, "r", "a") == 0
    assert ask(again, "s", "b") == len(BLOCKS)
    assert load(again, "s", len(BLOCKS)) == expected(5)


def test_two_engines_share_a_disk_tier(make_engine: Callable[..., SmallEngine]) -> None:
    name = f"disk-tier-{os.getpid()}"
    first, second = make_engine(instance=name), make_engine(instance=name)
    spill(first, value=2)
    assert ask(second, "r", "a") == len(BLOCKS)
    assert load(second, "r", len(BLOCKS)) == expected(2)
    shared = Segment.attach(f"/kvbm-{name}.disk", writable=False)
    assert shared.counters()["blocks_loaded"] == len(BLOCKS)
    shared.close()


def test_what_one_engine_reads_from_disk_another_one_does_not_read_again(
    make_engine: Callable[..., SmallEngine],
) -> None:
    name, chain = f"disk-tier-{os.getpid()}", list(range(TOKENS_MIN // BLOCK_TOKENS))
    first, second = (make_engine(instance=name, host_slots=len(chain)) for _ in range(2))
    second.leader.prefill.tokens_per_sec = 1.0
    first.store("long", chain, "a", 2.0)
    settle(first)
    first.store("push", chain, "b", 500.0)
    settle(first)
    reading, waiting = (engine.track("r", len(chain), "a") for engine in (first, second))
    assert first.leader.look_up(reading, 0, len(chain)) is None
    assert second.leader.look_up(waiting, 0, len(chain)) is None
    assert not tier(second)._fetches
    first.run_until(lambda: first.leader.look_up(reading, 0, len(chain)) == len(chain))
    second.run_until(lambda: second.leader.look_up(waiting, 0, len(chain)) == len(chain))
    assert counters(first)["blocks_loaded"] == len(chain)
    second.leader.abandon("r")  # the first engine proves at its end that nothing is held
