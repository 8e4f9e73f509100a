# SPDX-License-Identifier: Apache-2.0
"""A worker's slab and threads: which settings make them, what is logged, and how they end."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kvbm.worker.disk
from kvbm._fast.disk_batches import DiskBatches
from kvbm.errors import ConfigError
from kvbm.transfer.nixl import nixl_library
from kvbm.worker.disk import WorkerDisk, nixl_backends, slab_files
from tests.leaks import wait_until
from tests.small_engine import SmallEngine, settings_for

HOST, DISK = 12, 24
BLOCKS = list(range(8))
TARGETS = list(range(20, 28))
POSIX = {"nixl_backend_posix": True}


@pytest.fixture
def make_engine(tmp_path: Path) -> Iterator[Callable[..., SmallEngine]]:
    """Make engines with a disk tier to which every block is written."""
    made: list[SmallEngine] = []

    def make(**options: Any) -> SmallEngine:
        made.append(
            SmallEngine(
                HOST,
                disk_cache_override_num_blocks=DISK,
                disk_cache_dir=tmp_path,
                disable_disk_offload_filter=True,
                **options,
            )
        )
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def own_disk(engine: SmallEngine) -> WorkerDisk:
    """The first worker's disk, once it is open."""
    assert wait_until(lambda: engine.leader.disk is not None and engine.leader.disk.disk)
    disk = engine.workers[0]._disk
    assert disk is not None
    return disk


def round_trip(engine: SmallEngine) -> list[float | None]:
    """Values of a chain that went to disk, out of the host tier, and back to the device."""
    tier = engine.leader.disk
    assert tier is not None
    assert wait_until(lambda: tier.disk is not None)
    for number, seed in enumerate(("a", "b", "c")):
        engine.store(f"store {seed}", BLOCKS, seed, 10.0 * number)
        engine.run_until(lambda: not (engine.leader._storing or tier._candidates or tier._spills))
    sequence = engine.track("r", len(BLOCKS), "a")
    engine.run_until(lambda: engine.leader.look_up(sequence, 0, len(BLOCKS)) == len(BLOCKS))
    engine.place(sequence, TARGETS)
    engine.leader.load(sequence, len(BLOCKS))
    engine.run_until(lambda: "r" in engine.received)
    assert tier.disk is not None
    assert tier.disk.segment.counters()["blocks_loaded"] == len(BLOCKS)
    return engine.values(TARGETS)


# ---- settings ------------------------------------------------------------------------------------
def test_settings_say_how_slabs_are_made(tmp_path: Path) -> None:
    plain = slab_files(settings_for(8, disk_cache_dir=tmp_path))
    assert (plain.folder, plain.direct, plain.open_direct, plain.zerofill) == (
        tmp_path,
        True,
        False,
        False,
    )
    other = slab_files(
        settings_for(
            8,
            disk_disable_o_direct=True,
            disk_allocator_type="open-direct",
            disk_zerofill_fallback=True,
        )
    )
    assert (other.direct, other.open_direct, other.zerofill) == (False, True, True)


def test_backends_are_those_that_are_on_if_there_is_a_disk_tier(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kvbm.worker.disk, "nixl_library", lambda: None)
    assert nixl_backends(settings_for(8, disk_cache_gb=1.0)) == ()
    assert nixl_backends(settings_for(8, **POSIX)) == ()
    assert nixl_backends(settings_for(8, disk_cache_gb=1.0, **POSIX)) == ("POSIX",)
    both = settings_for(8, disk_cache_gb=1.0, nixl_backend_gds_mt=True, **POSIX)
    assert set(nixl_backends(both)) == {"POSIX", "GDS_MT"}


def test_a_worker_that_is_to_use_nixl_does_not_start_without_it(
    make_engine: Callable[..., SmallEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise ConfigError("NIXL is not there")

    monkeypatch.setattr(kvbm.worker.disk, "nixl_library", missing)
    with pytest.raises(ConfigError, match="NIXL is not there"):
        make_engine(**POSIX)


# ---- which I/O -----------------------------------------------------------------------------------
def test_blocks_go_to_disk_and_back(make_engine: Callable[..., SmallEngine]) -> None:
    assert round_trip(make_engine()) == [float(i) for i in range(len(BLOCKS))]


def test_blocks_go_to_disk_and_back_with_nixl(
    make_engine: Callable[..., SmallEngine], caplog: pytest.LogCaptureFixture
) -> None:
    try:
        nixl_library()
    except ConfigError:
        pytest.skip("NIXL is not installed (pip install --no-deps nixl-cu13)")
    caplog.set_level(logging.INFO)
    engine = make_engine(**POSIX)
    assert round_trip(engine) == [float(i) for i in range(len(BLOCKS))]
    assert "uses NIXL POSIX" in caplog.text
    assert sum(mover.blocks for mover in own_disk(engine)._movers) >= 2 * len(BLOCKS)


def test_where_no_backend_works_the_tier_goes_on_without(
    make_engine: Callable[..., SmallEngine],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(kvbm.worker.disk, "nixl_library", lambda: None)
    monkeypatch.setattr(kvbm.worker.disk, "usable_backend", lambda *_: None)
    assert round_trip(make_engine(**POSIX)) == [float(i) for i in range(len(BLOCKS))]
    assert "goes on without NIXL" in caplog.text


def test_where_nixl_refuses_the_pools_the_tier_goes_on_without(
    make_engine: Callable[..., SmallEngine],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    closed = []

    class Mover:
        """The third one cannot be made."""

        made = 0

        def __init__(self, *_: object) -> None:
            Mover.made += 1
            if Mover.made == 3:
                raise RuntimeError("no memory to register")

        def close(self) -> None:
            closed.append(self)

    monkeypatch.setattr(kvbm.worker.disk, "nixl_library", lambda: None)
    monkeypatch.setattr(kvbm.worker.disk, "usable_backend", lambda *_: "POSIX")
    monkeypatch.setattr(kvbm.worker.disk, "NixlMover", Mover)
    assert round_trip(make_engine(**POSIX)) == [float(i) for i in range(len(BLOCKS))]
    assert "cannot be opened for" in caplog.text
    assert "no memory to register" in caplog.text
    assert len(closed) == 2


# ---- log and end ---------------------------------------------------------------------------------
def test_failures_are_one_line_in_a_while(
    make_engine: Callable[..., SmallEngine],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    disk = own_disk(make_engine())

    class Failing:
        count = 3

        def problems(self) -> tuple[int, int, int]:
            return self.count, 7, 5

    failing = Failing()
    with monkeypatch.context() as patch:
        patch.setattr(disk, "_backend", failing)
        disk.report()
        assert (
            f"3 blocks could not be moved from or to disk; the last one, slot 7: {os.strerror(5)}"
            in (caplog.text)
        )
        failing.count = 9
        disk.report()
        assert caplog.text.count("could not be moved") == 1
        patch.setattr(kvbm.worker.disk, "LOG_SECS", 0.0)
        disk.report()
        assert "6 blocks could not be moved" in caplog.text


def test_a_thread_that_hangs_is_named_and_keeps_the_memory_mapped(
    make_engine: Callable[..., SmallEngine],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    gate = threading.Event()

    class Hanging(DiskBatches):
        def serve(self) -> None:
            gate.wait(20)

    monkeypatch.setattr(kvbm.worker.disk, "DiskBatches", Hanging)
    monkeypatch.setattr(kvbm.worker.disk, "END_SECS", 0.05)
    engine = make_engine()
    disk = own_disk(engine)
    assert not disk.close()
    assert "hang on the disk" in caplog.text
    gate.set()
    assert wait_until(disk.close)


def test_the_end_comes_while_the_slab_is_being_made(
    make_engine: Callable[..., SmallEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = threading.Event()

    class Slow(kvbm.worker.disk.Slab):
        def _reserve(self, total: int) -> None:
            begun.set()
            assert wait_until(self._stopping)
            super()._reserve(total)

    monkeypatch.setattr(kvbm.worker.disk, "Slab", Slow)
    engine = make_engine()
    assert begun.wait(10)
    disk = engine.workers[0]._disk
    engine.close()
    assert disk is not None
    assert disk._slab is None
