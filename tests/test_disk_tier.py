# SPDX-License-Identifier: Apache-2.0
"""The flow between host and disk, with real slabs: what is written, what comes back, what fails."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kvbm.disk_tier
import kvbm.worker_disk
from kvbm._fast.disk_batches import DiskBatches
from kvbm._fast.keys import Keys
from kvbm._fast.segment import Segment
from kvbm._fast.slab import SLAB_HEADER
from kvbm.arrivals import TOKENS_MIN
from kvbm.disk_tier import DiskTier
from kvbm.instance import remove
from kvbm.shared import close_and_remove
from kvbm.tiers.disk import PAGE_BYTES, read_slab, slab_path
from tests.disk_rig import Calls
from tests.fast.instances import digests
from tests.leaks import wait_until
from tests.small_engine import BLOCK_TOKENS, SmallEngine

HOST, DISK = 12, 64
BLOCKS = list(range(8))
TARGETS = list(range(20, 28))


@pytest.fixture
def make_engine(tmp_path: Path) -> Iterator[Callable[..., SmallEngine]]:
    """Make engines with a disk tier; what a named instance leaves in memory is removed."""
    made: list[SmallEngine] = []

    def make(**options: Any) -> SmallEngine:
        options = {
            "host_slots": HOST,
            "disk_cache_override_num_blocks": DISK,
            "disk_cache_dir": tmp_path,
            "disable_disk_offload_filter": True,
        } | options
        made.append(SmallEngine(options.pop("host_slots"), **options))
        assert wait_until(lambda: tier(made[-1]).disk is not None)
        return made[-1]

    yield make
    for engine in made:
        engine.close()
        remove(engine.instance)


@pytest.fixture
def engine(make_engine: Callable[..., SmallEngine]) -> SmallEngine:
    """A private engine that writes every block to disk."""
    return make_engine()


def tier(engine: SmallEngine) -> DiskTier:
    """The engine's disk tier."""
    assert engine.leader.disk is not None
    return engine.leader.disk


def counters(engine: SmallEngine) -> dict[str, int]:
    """Counters of the disk tier."""
    disk = tier(engine).disk
    assert disk is not None
    return disk.segment.counters()


def idle(engine: SmallEngine) -> bool:
    """Whether nothing is on its way to or from disk."""
    own = tier(engine)
    storing = bool(engine.leader._storing)
    return not (storing or own._spills or own._fetches or own._candidates)


def settle(engine: SmallEngine) -> None:
    """Step until nothing is on its way."""
    engine.run_until(lambda: idle(engine))


def ask(engine: SmallEngine, request: str, seed: object, blocks: int = len(BLOCKS)) -> int:
    """Ask for a request's blocks as an engine does, again and again; returns the answer."""
    sequence = engine.track(request, blocks, seed)
    answers: list[int | None] = [None]

    def answered() -> bool:
        answers[0] = engine.leader.look_up(sequence, 0, blocks)
        return answers[0] is not None

    engine.run_until(answered)
    assert answers[0] is not None
    return answers[0]


def load(engine: SmallEngine, request: str, count: int) -> list[float | None]:
    """Load what was found to device blocks; returns their values."""
    sequence = engine.leader.sequences[request]
    targets = TARGETS[:count]
    engine.place(sequence, targets)
    engine.leader.load(sequence, count)
    engine.run_until(lambda: request in engine.received)
    assert not engine.missing
    return engine.values(targets)


def spill(engine: SmallEngine, seed: object = "a", value: float = 1.0) -> None:
    """Store a chain, let it reach the disk, and push it out of the host tier."""
    engine.store(f"store {seed}", BLOCKS, seed, value)
    settle(engine)
    for number in range(2):
        engine.store(f"push {seed} {number}", BLOCKS, f"push {seed} {number}", 500.0)
    settle(engine)


def expected(value: float, count: int = len(BLOCKS)) -> list[float]:
    """Values of the first blocks of a chain stored with this value."""
    return [value + i for i in range(count)]


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


def test_reads_of_a_chain_may_end_in_any_order(
    make_engine: Callable[..., SmallEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, gate = Calls(), threading.Event()
    monkeypatch.setattr(kvbm.disk_tier, "BATCH_BLOCKS", 2)
    with_calls = functools.partial(DiskBatches, calls=calls.addresses)
    monkeypatch.setattr(kvbm.worker_disk, "DiskBatches", with_calls)
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
    engine.leader.abandon("short")
    before = counters(engine)["blocks_loaded"]
    assert ask(engine, "r", "a") == len(BLOCKS)
    assert counters(engine)["blocks_loaded"] == before + len(BLOCKS) - 3
    assert load(engine, "r", len(BLOCKS)) == expected(3)


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
    engine = make_engine(disk_cache_override_num_blocks=20)
    for number in range(5):
        spill(engine, number, 10 * number)
    assert counters(engine)["evicted"] > 0
    assert ask(engine, "r", 4) == len(BLOCKS)
    assert load(engine, "r", len(BLOCKS)) == expected(40)


# ---- what is not worth it ------------------------------------------------------------------------
def test_a_disk_that_is_slower_than_computing_is_not_read(engine: SmallEngine) -> None:
    spill(engine)
    own = tier(engine)
    own.reads.bytes_per_sec = 1.0
    own.prefill.tokens_per_sec = 1e6
    assert ask(engine, "r", "a") == 0
    assert counters(engine)["loads"] == 0
    engine.leader.abandon("r")
    own.prefill.tokens_per_sec = 1e-6
    assert ask(engine, "s", "a") == len(BLOCKS)


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


# ---- failures ------------------------------------------------------------------------------------
def flip_everything(folder: Path, name: str) -> None:
    """Change a byte in each slot's data."""
    path = slab_path(folder, name, 0)
    found = read_slab(path)
    assert found is not None
    layout = found[0].layout
    with open(path, "r+b") as file:
        for slot in range(layout.slots):
            file.seek(layout.data_offset + slot * layout.stride + 10)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 255]))


def test_damaged_bytes_are_never_served(
    make_engine: Callable[..., SmallEngine], tmp_path: Path
) -> None:
    name = f"disk-tier-{os.getpid()}"
    engine = make_engine(instance=name, disk_disable_o_direct=True)
    spill(engine)
    flip_everything(tmp_path, name)
    assert ask(engine, "r", "a") == 0
    assert counters(engine)["loads_failed"] == 1
    assert counters(engine)["check_failures"] == 1  # its slot is not used again
    engine.leader.abandon("r")
    assert ask(engine, "s", "a") == 0  # and it is not asked for again soon
    assert counters(engine)["loads_failed"] == 1


def test_a_damaged_block_is_written_anew_elsewhere(
    make_engine: Callable[..., SmallEngine], tmp_path: Path
) -> None:
    name = f"disk-tier-{os.getpid()}"
    engine = make_engine(instance=name, disk_disable_o_direct=True)
    spill(engine)
    own = tier(engine)
    assert own.disk is not None
    keys = Keys(digests(len(BLOCKS), "a"))
    flip_everything(tmp_path, name)
    assert ask(engine, "r", "a") == 0
    engine.leader.abandon("r")
    settle(engine)
    assert own.disk.match(keys, 0, len(BLOCKS)) == (0, None)
    assert len(own._quarantined) == 1
    own.failures.forget()
    spill(engine, value=7)
    assert ask(engine, "s", "a") == len(BLOCKS)
    assert load(engine, "s", len(BLOCKS)) == expected(7)


def test_slots_are_kept_in_quarantine_up_to_a_number(
    make_engine: Callable[..., SmallEngine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kvbm.disk_tier, "QUARANTINE_MAX", 2)
    name = f"disk-tier-{os.getpid()}"
    engine = make_engine(instance=name, disk_disable_o_direct=True)
    for number in range(3):
        spill(engine, number)
    flip_everything(tmp_path, name)
    for number in range(3):
        assert ask(engine, f"r{number}", number) == 0
        engine.leader.abandon(f"r{number}")
    own = tier(engine)
    assert own.disk is not None
    assert len(own._quarantined) == 2
    assert sorted(own.disk.held().values()) == [1, 1]
    engine.leader.reset()
    assert own.disk.held() == {}


def test_a_read_that_came_too_late_damages_nothing(
    engine: SmallEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    spill(engine)
    own = tier(engine)
    engine.workers[0].loop.stop()  # type: ignore[union-attr]
    engine.workers[0]._copies.join(timeout=10)
    monkeypatch.setattr(kvbm.disk_tier, "DEADLINE_SECS", 0.05)
    assert ask(engine, "r", "a") == 0
    own.collect()
    assert own.disk is not None
    count, ref = own.disk.match(Keys(digests(len(BLOCKS), "a")), 0, len(BLOCKS))
    assert count == len(BLOCKS)
    assert ref is not None
    own.disk.unpin(ref)
    assert not own._damaged


def test_a_disk_that_keeps_failing_is_left_alone(
    make_engine: Callable[..., SmallEngine], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = f"disk-tier-{os.getpid()}"
    engine = make_engine(
        instance=name, disk_disable_o_direct=True, disk_cache_override_num_blocks=200
    )
    for number in range(5):
        spill(engine, number)
    flip_everything(tmp_path, name)
    for number in range(5):
        assert ask(engine, f"r{number}", number) == 0
        engine.leader.abandon(f"r{number}")
    assert "left alone" in caplog.text
    failed = counters(engine)["loads_failed"]
    assert failed == 4
    assert not tier(engine).health.allows()


def test_a_disk_on_which_nothing_ends_is_switched_off_and_requests_go_on(
    engine: SmallEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spill(engine)
    engine.workers[0].loop.stop()  # type: ignore[union-attr]  # nobody takes operations any more
    engine.workers[0]._copies.join(timeout=10)
    monkeypatch.setattr(kvbm.disk_tier, "DEADLINE_SECS", 0.05)
    assert ask(engine, "r", "a") == 0
    assert tier(engine).health.is_off
    assert "the disk tier is off" in caplog.text


def test_without_a_slab_the_engine_serves_without_a_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    engine = SmallEngine(
        HOST, disk_cache_override_num_blocks=DISK, disk_cache_dir=tmp_path / "file"
    )
    try:
        assert wait_until(lambda: "there is no disk tier" in caplog.text)
        engine.store("r", BLOCKS, "a", 3)
        assert ask(engine, "s", "a") == len(BLOCKS)
        assert load(engine, "s", len(BLOCKS)) == expected(3)
    finally:
        engine.close()


def test_nothing_is_held_when_all_is_quiet(engine: SmallEngine) -> None:
    for number in range(3):
        spill(engine, number)
    ask(engine, "r", 0)
    engine.leader.abandon("r")
    settle(engine)
    own = tier(engine)
    assert own.disk is not None
    assert own.disk.held() == {}
    assert own.table.held() == {}


def test_the_end_with_writes_under_way_leaves_nothing(engine: SmallEngine) -> None:
    engine.store("r", BLOCKS, "a")
    engine.run_until(lambda: tier(engine)._spills or counters(engine)["stores"])
    engine.leader.close()  # what still runs is left to recovery
    assert engine.opener is not None
    engine.opener.close()
    engine.leader = None  # type: ignore[assignment]
    engine.raw.close()
    close_and_remove(engine.segment, engine.instance)
    engine.close()
    assert list(Path("/dev/shm").glob(f"kvbm-{engine.instance}*")) == []
