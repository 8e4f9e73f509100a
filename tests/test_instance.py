# SPDX-License-Identifier: Apache-2.0
"""Names of an instance's objects, and who may remove them."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from kvbm._fast.objects import SHARED_MEMORY, object_path
from kvbm.instance import (
    arena_name,
    engine_key,
    instances,
    is_private,
    private_instance,
    remove,
    remove_dead_private_instances,
    remove_if_unused,
    segment_name,
)
from kvbm.tiers.host import ArenaHeader, HostArena
from tests.small_engine import unique_engine_id

HEADER = ArenaHeader(
    rank=0, ranks=1, bytes_per_block=64, device_blocks=8, nonce=0, geometry=b"g" * 32
)


@pytest.fixture
def private() -> Iterator[str]:
    """Name of a private instance; removed at the end."""
    name = private_instance(unique_engine_id())
    yield name
    remove(name)


@pytest.fixture
def named() -> Iterator[str]:
    """Name of an instance that outlives its users; removed at the end."""
    name = f"instance-{os.getpid()}"
    yield name
    remove(name)


def hold(instance: str, connection: Connection) -> None:
    """Use an arena until told to end, in a process of its own."""
    arena = HostArena(instance, HEADER, exclusive=False)
    connection.send("held")
    connection.recv()
    os.kill(os.getpid(), 9)
    arena.close()


def test_names_are_derived_from_the_instance() -> None:
    assert segment_name("name") == "/kvbm-name"
    assert arena_name("name", 3) == "/kvbm-name.host.3"
    assert 0 <= engine_key("engine") < 2**64
    assert engine_key("engine") != engine_key("engine_dp1")


def test_only_names_made_from_an_engine_are_private() -> None:
    assert is_private(private_instance("engine"))
    for name in ("p-", "p-0123456789abcdeg", "p-0123456789abcdef0", "prod", "P-0123456789abcdef"):
        assert not is_private(name)


def test_all_objects_of_an_instance_are_found(named: str) -> None:
    arenas = [
        HostArena(named, ArenaHeader(rank, 2, 64, 8, 0, b"g" * 32), exclusive=False)
        for rank in range(2)
    ]
    assert instances()[named] == [arena_name(named, 0), arena_name(named, 1)]
    for arena in arenas:
        arena.close()
    assert remove_if_unused(named)
    assert named not in instances()


def test_what_somebody_uses_is_not_removed(private: str) -> None:
    arena = HostArena(private, HEADER, exclusive=True)
    assert not remove_if_unused(private)
    assert private not in remove_dead_private_instances()
    assert private in instances()
    arena.close()
    assert remove_if_unused(private)
    assert private not in instances()


def test_removing_what_is_not_there_is_done() -> None:
    assert remove_if_unused(private_instance(unique_engine_id()))


def test_what_a_killed_process_left_is_removed_if_it_is_private(private: str, named: str) -> None:
    context = multiprocessing.get_context("spawn")
    children = []
    for name in (private, named):
        ours, theirs = context.Pipe()
        child = context.Process(target=hold, args=(name, theirs))
        child.start()
        assert ours.recv() == "held"
        children.append((child, ours))
    assert private not in remove_dead_private_instances()
    for child, connection in children:
        connection.send("end")
        child.join()
        child.close()
        connection.close()
    assert private in remove_dead_private_instances()
    assert private not in instances()
    assert named in instances()


def test_an_object_that_lost_its_name_is_made_anew(private: str) -> None:
    first = HostArena(private, HEADER, exclusive=True)
    remove(private)
    second = HostArena(private, HEADER, exclusive=True)
    assert (SHARED_MEMORY / arena_name(private, 0).lstrip("/")).exists()
    first.close()
    second.close()


@pytest.mark.parametrize("what", ["link", "pipe", "folder"])
def test_what_somebody_planted_under_a_private_name_disturbs_no_start(
    private: str, tmp_path: Path, what: str
) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    path = object_path(segment_name(private))
    if what == "link":
        path.symlink_to(target)
    elif what == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    try:
        assert private not in remove_dead_private_instances()
        assert path.is_symlink() or path.exists()
    finally:
        if what == "folder":
            path.rmdir()
    assert target.read_bytes() == b"precious"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_what_belongs_to_another_user_is_left_to_him(private: str) -> None:
    path = object_path(segment_name(private))
    path.write_bytes(b"")
    os.chown(path, 65534, 65534)
    assert private not in remove_dead_private_instances()
    assert path.exists()


def test_what_a_group_may_use_is_removed_by_its_owner(private: str) -> None:
    HostArena(private, HEADER, exclusive=True, group=os.getgid()).close()
    assert private in remove_dead_private_instances()
    assert private not in instances()
