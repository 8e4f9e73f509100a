# SPDX-License-Identifier: Apache-2.0
"""Engines on a real shared memory that is small, read-only, or another user's."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvbm.tiers.host
from kvbm._fast.objects import SHARED_MEMORY
from kvbm._fast.segment import segment_bytes, shape_for
from kvbm.errors import ConfigError, SegmentAccessDenied, SegmentError
from kvbm.instance import arena_name, instances, private_instance
from kvbm.tiers.host import HostArena
from tests.leaks import wait_until
from tests.mounts import become_nobody, mount, with_mounts
from tests.small_engine import BLOCK_TOKENS, SmallEngine, unique_engine_id
from tests.tiers.test_host import HEADER

MIB = 1 << 20
PIECE = 16 << 10
BLOCK_BYTES = 384  # of a `SmallEngine`
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def refusal(start: Callable[[], object], kind: type[Exception] = ConfigError) -> str:
    """What `start` is refused with; nothing may be left."""
    with pytest.raises(kind) as caught:
        start()
    assert instances() == {}
    return str(caught.value)


def start_worker(**settings: Any) -> None:
    """Start the first process of an engine."""
    SmallEngine(32, start=False, **settings).start_worker()


def fill(folder: Path) -> None:
    """Leave no byte."""
    (folder / "full").write_bytes(bytes(os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize))


def test_a_tier_that_does_not_fit_is_refused_before_anything_is_made() -> None:
    def check() -> None:
        mount(options=f"size={4 * MIB}")
        text = refusal(lambda: start_worker(cpu_cache_gb=0.02, cpu_cache_override_num_blocks=None))
        assert text.startswith("DYN_KVBM_CPU_CACHE_GB=0.02: the host tier needs 20000000 bytes")
        assert f"has {4 * MIB} bytes (0.004 GB) free of {4 * MIB}" in text
        for way in ("remount,size=1G /dev/shm", "--shm-size=1g", "sizeLimit: 1Gi"):
            assert way in text

    with_mounts(check)


def test_a_restart_needs_only_what_is_not_there_yet() -> None:
    def check() -> None:
        mount(options=f"size={24 * MIB}")
        size = {"cpu_cache_gb": 0.008, "cpu_cache_override_num_blocks": None, "instance": "again"}
        for _ in range(2):
            engine = SmallEngine(8_000_000 // BLOCK_BYTES, **size)
            engine.store("request", [1, 2, 3])
            engine.close()
        assert os.statvfs(SHARED_MEMORY).f_bavail * 4096 < 8_000_000  # no room for another one
        text = refusal_beside("again", lambda: start_worker(**size | {"cpu_cache_gb": 0.02}))
        assert text.startswith("DYN_KVBM_CPU_CACHE_GB=0.02: the host tier needs 1")

    with_mounts(check)


def refusal_beside(instance: str, start: Callable[[], object]) -> str:
    """What `start` is refused with, while an instance keeps what it has."""
    before = instances()
    with pytest.raises(ConfigError) as caught:
        start()
    assert instances() == before
    assert list(before) == [instance]
    return str(caught.value)


def test_what_a_dead_engine_left_is_no_reason_to_fail() -> None:
    def check() -> None:
        mount(options=f"size={16 * MIB}")
        dead = private_instance(unique_engine_id())
        (SHARED_MEMORY / arena_name(dead, 0)[1:]).write_bytes(bytes(12 * MIB))
        engine = SmallEngine(32, start=False, cpu_cache_gb=0.01, cpu_cache_override_num_blocks=None)
        engine.start_worker()
        assert dead not in instances()
        engine.close()

    with_mounts(check)


def test_without_room_for_a_page_the_worker_does_not_start() -> None:
    def check() -> None:
        mount(options="size=8192")
        fill(SHARED_MEMORY)
        text = refusal(start_worker)
        assert text.startswith("DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS=32 ")
        assert "has 0 bytes" in text

    with_mounts(check)


def test_an_arena_whose_room_somebody_takes_meanwhile_is_refused() -> None:
    def check() -> None:
        mount(options="size=8192")
        fill(SHARED_MEMORY)
        with pytest.raises(SegmentError, match=r"No space left.*DYN_KVBM_CPU_CACHE_GB") as caught:
            HostArena("full", HEADER, exclusive=False)
        assert caught.value.name == arena_name("full", 0)

    with_mounts(check)


def test_a_segment_whose_room_somebody_takes_meanwhile_is_refused() -> None:
    def check() -> None:
        mount(options=f"size={64 << 10}")
        engine = SmallEngine(32, start=False)
        engine.start_worker()
        fill(SHARED_MEMORY)
        with pytest.raises(SegmentError, match=r"cannot be made in /dev/shm: No space left.*GiB"):
            engine.start_leader()
        engine.close()
        assert instances() == {}

    with_mounts(check)


def test_a_read_only_shared_memory_is_refused() -> None:
    def check() -> None:
        mount(read_only=True)
        text = refusal(start_worker)
        assert "/dev/shm is mounted read-only" in text
        assert "remount,rw" in text
        assert "Read-only" in refusal(
            lambda: HostArena("read-only", HEADER, exclusive=False), SegmentError
        )

    with_mounts(check)


@as_root
def test_a_shared_memory_that_this_user_may_not_write_is_refused() -> None:
    def check() -> None:
        mount(options="mode=755")
        become_nobody()
        text = refusal(start_worker)
        assert re.search(r"user 65534 may not make files in /dev/shm.*user 0 .*mode 755", text)
        assert "chmod 1777 /dev/shm" in text
        assert "user 65534 may not make files in /dev/shm" in refusal(
            lambda: HostArena("denied", HEADER, exclusive=False), SegmentAccessDenied
        )

    with_mounts(check)


@as_root
def test_the_cache_of_another_user_is_refused_and_left() -> None:
    def check() -> None:
        mount(options="mode=1777")
        owner = SmallEngine(32, instance="theirs")
        owner.close()
        before = instances()
        become_nobody()
        with pytest.raises(SegmentAccessDenied, match=r"belongs to user 0.*is user 65534"):
            start_worker(instance="theirs")
        assert instances() == before

    with_mounts(check)


@pytest.mark.parametrize("threads", [1, 3])
def test_an_engine_with_less_memory_than_it_reckoned_with_runs_on_a_smaller_tier(
    threads: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kvbm.tiers.host, "RESERVE_BYTES", PIECE)
    monkeypatch.setattr(kvbm.tiers.host, "reserve_threads", lambda: threads)
    slots = 1000

    def check() -> None:
        state = segment_bytes(shape_for(slots, 0, 1, BLOCK_TOKENS, private_instance=True))
        mount(options=f"size={state + 200 * 1024}")
        with caplog.at_level(logging.ERROR, "kvbm"):
            engine = SmallEngine(slots, start=False)
            engine.start_worker()
            engine.start_leader()
            assert wait_until(lambda: "no more memory in /dev/shm" in caplog.text)
        for part in ("No space left on device", "DYN_KVBM_CPU_CACHE_GB", "--shm-size="):
            assert part in caplog.text
        usable = engine.segment.ready_slots(0)
        assert 300 < usable < slots
        # The rest is left to others, but for less than what could be reserved at once.
        room = os.statvfs(SHARED_MEMORY)
        assert 0 < room.f_bavail * room.f_frsize < PIECE + 4096
        # More blocks than fit: no signal, and what is there is right.
        assert wait_until(engine.leader.liveness.workers_ready)
        for number in range(slots // 8):
            engine.store(f"store-{number}", range(1, 9), number, 10 * number)
        assert engine.counter("evicted") > 0
        engine.load("load", range(30, 38), number)
        engine.run_until(lambda: "load" in engine.received)
        assert engine.values(range(30, 38)) == [10 * number + block for block in range(8)]
        engine.leader.finish("load", 8)
        engine.run_until(lambda: not engine.leader.holds_device_blocks)
        engine.close()

    with_mounts(check)
