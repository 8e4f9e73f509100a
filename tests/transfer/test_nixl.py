# SPDX-License-Identifier: Apache-2.0
"""NIXL moves a disk tier's blocks: the real library, where it is installed."""

from __future__ import annotations

import importlib
import os
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import kvbm.transfer.nixl
from kvbm._fast.disk_batches import DiskBatches
from kvbm.errors import ConfigError
from kvbm.tiers.disk import Slab, SlabFiles, Superblock
from kvbm.transfer.nixl import NixlMover, nixl_library, usable_backend
from tests.copy_rig import CHUNK, LAYERS, SLOTS, HostMemory, content
from tests.disk_rig import DiskRig
from tests.fast.instances import Instance, instance, matched

DEVICE = [5, 6, 7, 30, 2, 9]
TARGETS = [10, 11, 12, 13, 14, 15]
DISK = [3, 4, 5, 20, 1, 23]


@pytest.fixture
def library() -> ModuleType:
    """The real library."""
    try:
        return nixl_library()
    except ConfigError:
        pytest.skip("NIXL is not installed (pip install --no-deps nixl-cu13)")


class OnePiece(HostMemory):
    """A KV cache in one tensor: a block is one piece."""

    def __init__(self) -> None:
        super().__init__()
        from tests.transfer.kv_tensors import ArrayTensor

        self.layers = [np.zeros((48, LAYERS * CHUNK), np.uint8)]
        self.allocations = self.layers
        self.tensors = {"all": ArrayTensor(self.layers[0])}

    def write(self, block: int, data: bytes) -> None:
        self.layers[0][block] = np.frombuffer(data, np.uint8)

    def read(self, block: int) -> bytes:
        return self.layers[0][block].tobytes()


class Rigs:
    """Makes rigs that move with NIXL, and keeps their movers."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.instances: list[Instance] = []
        self.movers: list[NixlMover] = []
        self.rigs: list[DiskRig] = []

    def make(self, library: ModuleType, *, one_piece: bool, **options: Any) -> DiskRig:
        def servers(batches: DiskBatches, slab: Slab) -> list[Callable[[], None]]:
            self.movers += [NixlMover(library, "POSIX", batches, slab) for _ in range(2)]
            return [mover.serve for mover in self.movers]

        memory = OnePiece() if one_piece else HostMemory()
        self.instances.append(instance(host_slots=SLOTS))
        self.rigs.append(
            DiskRig(self.instances[-1], self._folder, servers=servers, memory=memory, **options)
        )
        return self.rigs[-1]

    def close(self) -> None:
        for rig in self.rigs:
            rig.disk.stop()
            for thread in rig.threads:
                thread.join(timeout=10)
        while self.movers:  # they keep the arena mapped
            self.movers.pop().close()
        for rig in self.rigs:
            rig.close()
        for one in self.instances:
            one.prove()
            one.remove()

    def moved(self) -> int:
        return sum(mover.blocks for mover in self.movers)


@pytest.fixture
def rigs(tmp_path: Path) -> Iterator[Rigs]:
    """Rigs over one folder; their segments are proven idle."""
    made = Rigs(tmp_path)
    yield made
    made.close()


def spilled_and_forgotten(rig: DiskRig) -> Any:
    """A chain that is on disk and nowhere else."""
    keys = rig.stored("a", DEVICE)
    assert rig.spilled(keys, DISK) is True
    rig.stored("other", range(SLOTS))
    assert matched(rig.table, keys) == 0
    return keys


@pytest.mark.parametrize(
    ("one_piece", "options"),
    [(True, {}), (False, {}), (True, {"direct": False}), (True, {"alignment": 8192})],
    ids=["one descriptor a block", "pieces", "page cache", "unaligned"],
)
def test_a_chain_comes_back_as_it_was(
    library: ModuleType, rigs: Rigs, one_piece: bool, options: dict[str, Any]
) -> None:
    rig = rigs.make(library, one_piece=one_piece, **options)
    assert rig.disk.is_contiguous is (one_piece and "alignment" not in options)
    keys = spilled_and_forgotten(rig)
    assert rig.fetched(keys, DISK) is True
    assert rig.loaded(keys, TARGETS, 5) is True
    assert [rig.memory.read(block) for block in TARGETS] == [content(i) for i in range(6)]
    assert rigs.moved() == 2 * len(DISK)


def test_a_buffer_of_one_row_moves_them_all(
    library: ModuleType, rigs: Rigs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvbm.transfer.nixl, "BUFFER_BYTES", 1)
    rig = rigs.make(library, one_piece=False)
    keys = spilled_and_forgotten(rig)
    assert rig.fetched(keys, DISK) is True
    assert rig.loaded(keys, TARGETS, 5) is True
    assert rig.memory.read(TARGETS[5]) == content(5)


@pytest.mark.parametrize("one_piece", [True, False])
def test_a_flipped_bit_is_noticed(library: ModuleType, rigs: Rigs, one_piece: bool) -> None:
    rig = rigs.make(library, one_piece=one_piece)
    keys = spilled_and_forgotten(rig)
    rig.flip(rig.data_offset(DISK[3]) + 777)
    assert rig.fetched(keys, DISK) is False
    assert rig.disk.problems()[:2] == (1, DISK[3])
    assert matched(rig.table, keys) == 0


@pytest.mark.parametrize("one_piece", [True, False])
def test_a_truncated_file_fails_its_row_and_nothing_else(
    library: ModuleType, rigs: Rigs, one_piece: bool, caplog: pytest.LogCaptureFixture
) -> None:
    rig = rigs.make(library, one_piece=one_piece)
    keys = spilled_and_forgotten(rig)
    os.ftruncate(rig.slab.table_fd, rig.data_offset(23) + 4096)
    assert rig.fetched(keys, DISK) is False
    assert rig.disk.problems()[:2] == (1, 23)
    assert "could not move 6 blocks" in caplog.text
    assert rig.fetched(keys, DISK[:5]) is True  # with an agent that was made anew
    assert rig.loaded(keys, TARGETS[:5], 5) is True
    assert rig.memory.read(TARGETS[4]) == content(4)


def test_a_thread_on_which_nixl_keeps_failing_goes_on_without(
    library: ModuleType,
    rigs: Rigs,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rig = rigs.make(library, one_piece=True)

    def failing(*_: object) -> None:
        raise RuntimeError("no more")

    monkeypatch.setattr(kvbm.transfer.nixl._Pools, "move", failing)
    keys = spilled_and_forgotten(rig)
    for number in range(6):
        assert rig.spilled(rig.stored(number, DEVICE), DISK) is True
    assert "goes on without NIXL" in caplog.text
    keys = rig.stored("a", DEVICE)
    assert rig.spilled(keys, DISK) is True
    assert rigs.moved() == 0


@pytest.mark.parametrize("one_piece", [True, False])
@pytest.mark.parametrize("missing", [1, 6])
def test_a_transfer_that_is_called_done_without_its_bytes_is_noticed(
    library: ModuleType,
    rigs: Rigs,
    monkeypatch: pytest.MonkeyPatch,
    one_piece: bool,
    missing: int,
) -> None:
    move = kvbm.transfer.nixl._Pools.move

    def lying(self: Any, reading: bool, host: Any, disk: Any) -> None:
        arrive = len(disk) - missing if reading else len(disk)
        if arrive:
            move(self, reading, host[:arrive], disk[:arrive])

    rig = rigs.make(library, one_piece=one_piece)
    keys = spilled_and_forgotten(rig)
    for mover in rigs.movers:
        if mover._buffers is not None:
            mover._buffers[:] = 0  # the blocks' bytes, on their way to disk
    monkeypatch.setattr(kvbm.transfer.nixl._Pools, "move", lying)
    assert rig.fetched(keys, DISK) is False
    assert rig.disk.problems()[:2] == (1, DISK[len(DISK) - missing])
    assert matched(rig.table, keys) == 0


def test_an_agent_that_failed_is_gone_before_its_blocks_are_moved_in_another_way(
    library: ModuleType, rigs: Rigs, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = rigs.make(library, one_piece=True)
    agents: list[weakref.ref[Any]] = []
    alive: list[bool] = []

    def failing(self: Any, *_: object) -> None:
        agents.append(weakref.ref(self._agent))
        raise RuntimeError("no more")

    class Batches:
        """Looks at the agent when an operation is given back."""

        def __init__(self, batches: DiskBatches) -> None:
            self._batches = batches

        def __getattr__(self, name: str) -> Any:
            return getattr(self._batches, name)

        def give(self, place: int, moved: bool) -> None:
            alive.extend([] if moved else [agents[-1]() is not None])
            self._batches.give(place, moved)

    for mover in rigs.movers:
        mover._batches = Batches(rig.disk)  # type: ignore[assignment]
    keys = rig.stored("a", DEVICE)
    assert rig.spilled(keys, DISK) is True  # whoever waits for work has the right ones from now on
    with monkeypatch.context() as patch:
        patch.setattr(kvbm.transfer.nixl._Pools, "move", failing)
        for number in range(4):
            assert rig.spilled(rig.stored(number, DEVICE), DISK) is True
    assert alive
    assert not any(alive)


# ---- what is there -------------------------------------------------------------------------------
def wanted(folder: Path) -> Slab:
    """A small slab."""
    return Slab(SlabFiles(folder), Superblock(0, 1, 4, 5000, b"f" * 32))


def test_posix_is_used_where_gds_does_not_work_and_the_log_says_why(
    library: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    slab = wanted(tmp_path)
    found = usable_backend(library, ("POSIX", "GDS", "GDS_MT"), slab)
    if found == "POSIX":  # elsewhere GDS works
        assert "NIXL GDS_MT cannot be used" in caplog.text
        assert "NIXL GDS cannot be used" in caplog.text
    assert found in ("POSIX", "GDS", "GDS_MT")
    assert usable_backend(library, (), slab) is None
    slab.close()


def test_a_backend_that_reads_other_bytes_is_not_used(
    library: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    slab = wanted(tmp_path)
    os.pwrite(slab.table_fd, b"x", 20)
    assert usable_backend(library, ("POSIX",), slab) is None
    assert "other bytes" in caplog.text
    slab.close()


def test_without_the_library_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> ModuleType:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r"pip install 'kvbm\[nixl\]'"):
        nixl_library()
