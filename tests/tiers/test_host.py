# SPDX-License-Identifier: Apache-2.0
"""Arenas: their header page, who may use one, and the reservation of their memory."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import kvbm.tiers.host
from kvbm._fast.locks import try_lock
from kvbm._fast.objects import SHARED_MEMORY, object_path, open_object
from kvbm._fast.segment import LOCK_USERS_OFFSET
from kvbm.errors import LeaderTimeout, SegmentAccessDenied, SegmentError, SegmentInUse
from kvbm.instance import arena_name, remove
from kvbm.tiers.host import (
    PAGE_BYTES,
    ArenaHeader,
    HostArena,
    read_header,
    wait_for_headers,
)
from tests.fast.instances import run_in_fork

HEADER = ArenaHeader(0, 1, 4096, 8, 0, b"geometry".ljust(32, b"\0"))
TOTAL = 3 * PAGE_BYTES + 100
USES: list[Callable[[str], object]] = [
    lambda instance: HostArena(instance, HEADER, exclusive=False),
    lambda instance: read_header(instance, 0),
]


@pytest.fixture
def instance() -> Iterator[str]:
    """Name of an instance; removed at the end."""
    name = f"host-{os.getpid()}"
    yield name
    remove(name)


@pytest.fixture
def arena(instance: str) -> Iterator[HostArena]:
    """A mapped arena."""
    made = HostArena(instance, HEADER, exclusive=True)
    made.map(TOTAL)
    yield made
    made.close()


def path_of(arena: HostArena) -> Path:
    """Path of the arena's object."""
    return SHARED_MEMORY / arena.name.lstrip("/")


# ---- header --------------------------------------------------------------------------------------
def test_a_header_page_is_read_back() -> None:
    header = ArenaHeader(3, 4, 2**40, 2**33, 2**64 - 1, bytes(range(32)))
    page = header.pack()
    assert len(page) == PAGE_BYTES
    assert ArenaHeader.unpack(page) == header


@pytest.mark.parametrize("at", [0, 7, 8, 16, 32, 40, 71, 72, 79])
def test_a_damaged_header_page_is_none(at: int) -> None:
    page = bytearray(HEADER.pack())
    page[at] ^= 1
    assert ArenaHeader.unpack(bytes(page)) is None


@pytest.mark.parametrize("page", [b"", b"\0" * PAGE_BYTES, HEADER.pack()[:60]])
def test_what_is_no_header_page_is_none(page: bytes) -> None:
    assert ArenaHeader.unpack(page) is None


# ---- use -----------------------------------------------------------------------------------------
def test_a_restart_adopts_the_content_and_its_nonce(instance: str) -> None:
    first = HostArena(instance, HEADER, exclusive=False)
    first.belong_to(77)
    first.map(TOTAL)[5000] = 42
    first.close()
    second = HostArena(instance, HEADER, exclusive=False)
    assert second.header.nonce == 77
    assert second.map(TOTAL)[5000] == 42
    second.close()


@pytest.mark.parametrize(
    "changes", [{"bytes_per_block": 64}, {"ranks": 2}, {"geometry": b"x" * 32}]
)
def test_content_of_another_kind_is_thrown_away_if_nobody_uses_it(
    instance: str, changes: dict[str, Any]
) -> None:
    first = HostArena(instance, HEADER, exclusive=False)
    first.belong_to(77)
    first.map(TOTAL)[5000] = 42
    first.close()
    second = HostArena(instance, replace(HEADER, **changes), exclusive=False)
    assert second.header.nonce == 0
    assert second.map(TOTAL)[5000] == 0
    second.close()


def test_two_engines_share_an_arena_of_one_kind_only(instance: str) -> None:
    first = HostArena(instance, HEADER, exclusive=False)
    second = HostArena(instance, HEADER, exclusive=False)
    with pytest.raises(SegmentInUse, match=instance):
        HostArena(instance, replace(HEADER, bytes_per_block=64), exclusive=False)
    with pytest.raises(SegmentInUse, match=instance):
        HostArena(instance, HEADER, exclusive=True)
    first.close()
    second.close()


def test_closing_twice_and_with_a_view_of_the_memory_is_harmless(arena: HostArena) -> None:
    assert arena._map is not None
    view = memoryview(arena._map)
    arena.close()
    arena.close()
    view[100] = 7  # still there, for whoever holds it
    view.release()
    assert path_of(arena).exists()


def test_an_arena_is_its_owners_alone_until_a_group_is_named(instance: str) -> None:
    for group, mode in ((None, 0o600), (os.getgid(), 0o660)):
        arena = HostArena(instance, HEADER, exclusive=False, group=group)
        assert stat.S_IMODE(path_of(arena).stat().st_mode) == mode
        arena.close()
    for use in USES:
        with pytest.raises(SegmentAccessDenied, match=f"{instance}.*lets group {os.getgid()} wr"):
            use(instance)


def test_a_link_that_somebody_planted_is_refused_and_its_target_left_alone(
    instance: str, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    link = object_path(arena_name(instance, 0))
    link.symlink_to(target)
    for use in USES:
        with pytest.raises(SegmentAccessDenied, match=f"{instance}.*symbolic link"):
            use(instance)
    assert target.read_bytes() == b"precious"


def test_an_object_that_is_never_let_go_is_an_error_after_a_while(
    instance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvbm.tiers.host, "OPEN_SECS", 0.01)
    descriptor = open_object(arena_name(instance, 0), os.O_RDWR | os.O_CREAT)
    assert try_lock(descriptor, LOCK_USERS_OFFSET, exclusive=True)
    try:
        with pytest.raises(SegmentInUse, match="does not end"):
            HostArena(instance, HEADER, exclusive=False)
    finally:
        os.close(descriptor)


def test_a_read_only_file_system_is_an_error_that_says_so(
    instance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(SegmentError, match="Read-only file system"):
        HostArena(instance, HEADER, exclusive=False)


# ---- reservation ---------------------------------------------------------------------------------
def test_memory_is_reserved_from_the_front_to_the_end(
    arena: HostArena, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvbm.tiers.host, "RESERVE_BYTES", PAGE_BYTES)
    reserved: list[int] = []
    assert arena.reserve(reserved.append, lambda: False)
    assert reserved == sorted(set(reserved))
    assert reserved[-1] == TOTAL
    assert path_of(arena).stat().st_blocks * 512 >= TOTAL


def test_memory_that_is_there_already_is_told_at_once(arena: HostArena) -> None:
    assert arena.reserve(lambda _: None, lambda: False)
    reserved: list[int] = []
    assert arena.reserve(reserved.append, lambda: True)
    assert reserved == [TOTAL]


def test_a_reservation_ends_early_when_it_is_to_stop(
    arena: HostArena, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvbm.tiers.host, "RESERVE_BYTES", PAGE_BYTES)
    monkeypatch.setattr(kvbm.tiers.host, "reserve_threads", lambda: 1)
    reserved: list[int] = []
    assert not arena.reserve(reserved.append, lambda: len(reserved) >= 2)
    assert reserved == [PAGE_BYTES, 2 * PAGE_BYTES]


def failing_after(good: int, problem: int) -> Callable[..., int]:
    """A `populate` that fails from the piece after `good` ones on."""
    calls = [0]

    def populate(*_: Any) -> int:
        calls[0] += 1
        return problem if calls[0] > good else 0

    return populate


def test_a_full_dev_shm_is_a_message_and_a_smaller_tier(
    arena: HostArena, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kvbm.tiers.host, "RESERVE_BYTES", PAGE_BYTES)
    monkeypatch.setattr(kvbm.tiers.host, "reserve_threads", lambda: 1)
    monkeypatch.setattr(kvbm.tiers.host, "populate", failing_after(1, errno.ENOSPC))
    reserved: list[int] = []
    with caplog.at_level(logging.ERROR, "kvbm"):
        assert not arena.reserve(reserved.append, lambda: False)
    assert reserved == [PAGE_BYTES]
    assert f"{PAGE_BYTES} of {TOTAL} bytes" in caplog.text
    assert "DYN_KVBM_CPU_CACHE_GB" in caplog.text


def test_memory_is_touched_on_the_processors_that_are_asked_for(
    arena: HostArena, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = frozenset({max(os.sched_getaffinity(0))})
    seen: list[set[int]] = []
    monkeypatch.setattr(
        kvbm.tiers.host, "populate", lambda *_: seen.append(os.sched_getaffinity(0)) or 0
    )
    before = os.sched_getaffinity(0)
    assert arena.reserve(lambda _: None, lambda: False, wanted)
    assert seen
    assert all(cpus == wanted for cpus in seen)
    assert os.sched_getaffinity(0) == before


def test_processors_that_the_process_may_not_use_change_nothing(arena: HostArena) -> None:
    assert arena.reserve(lambda _: None, lambda: False, frozenset({4095}))


def test_an_old_kernel_reserves_by_another_call(
    arena: HostArena, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvbm.tiers.host, "populate", failing_after(0, errno.EINVAL))
    assert arena.reserve(lambda _: None, lambda: False)
    assert path_of(arena).stat().st_blocks * 512 >= TOTAL


# ---- fork ----------------------------------------------------------------------------------------
@contextmanager
def forked_child() -> Iterator[None]:
    """A child that was forked before and lives until the end."""
    read, write = os.pipe()
    running, runs = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write)
        os.write(runs, b"!")
        os.read(read, 1)  # until the parent closes its end
        os._exit(0)
    os.close(read)
    try:
        assert os.read(running, 1) == b"!"
        yield
    finally:
        for descriptor in (write, running, runs):
            os.close(descriptor)
        os.waitpid(child, 0)


def nobody_uses(arena: HostArena) -> bool:
    """Whether the exclusive lock on the arena's object can be had."""
    with path_of(arena).open("r+b") as file:
        return try_lock(file.fileno(), LOCK_USERS_OFFSET, exclusive=True)


@pytest.mark.parametrize("referred_to", [False, True])
def test_a_forked_child_keeps_no_lock_of_its_parent(instance: str, referred_to: bool) -> None:
    arena = HostArena(instance, HEADER, exclusive=True)
    memory = arena.map(TOTAL)
    reference = memoryview(memory) if referred_to else None  # as the backend holds one
    with forked_child():
        assert not nobody_uses(arena)
        if reference is not None:
            reference.release()
        arena.close()
        assert nobody_uses(arena)


def test_a_forked_child_cannot_write_its_parents_header(arena: HostArena) -> None:
    def check() -> None:
        with pytest.raises(OSError, match="Bad file descriptor"):
            arena.belong_to(77)
        arena.close()

    run_in_fork(check)
    assert not nobody_uses(arena)
    assert ArenaHeader.unpack(path_of(arena).read_bytes()[:PAGE_BYTES]) == HEADER


# ---- announcement --------------------------------------------------------------------------------
def test_a_leader_finds_the_headers_of_all_ranks(instance: str) -> None:
    headers = [replace(HEADER, rank=rank, ranks=2) for rank in range(2)]
    arenas = [HostArena(instance, header, exclusive=False) for header in headers]
    assert wait_for_headers(instance, 2, 10.0) == headers
    for arena in arenas:
        arena.close()


def test_a_wait_that_takes_long_is_told_once(
    instance: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kvbm.tiers.host, "TELL_SECS", 0.0)
    with pytest.raises(LeaderTimeout):
        wait_for_headers(instance, 2, 0.05)
    assert caplog.text.count("2 of 2 workers have not announced themselves in /dev/shm") == 1
    assert "(ranks 0, 1)" in caplog.text
    assert "DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS=0.05" in caplog.text


def test_ranks_that_do_not_come_are_named(instance: str) -> None:
    arena = HostArena(instance, replace(HEADER, rank=1, ranks=3), exclusive=False)
    with pytest.raises(LeaderTimeout, match=r"0.*2"):
        wait_for_headers(instance, 3, 0.0)
    arena.close()


def test_a_header_that_may_not_be_read_is_an_error(
    instance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, "no")

    assert read_header(instance, 0) is None
    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(SegmentAccessDenied, match=instance):
        read_header(instance, 0)
