# SPDX-License-Identifier: Apache-2.0
"""Walks through the disk tier: slabs whose bytes are anything, and copies between host and disk."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from random import Random

import numpy as np

from kvbm._fast.copy import HostCopier
from kvbm._fast.disk_backend import DiskBackend
from kvbm._fast.disk_table import FrequencyFilter, raise_epoch
from kvbm._fast.hashing import xxh3_64
from kvbm._fast.keys import Keys
from kvbm._fast.slab import SLAB_HEADER, valid_headers
from kvbm.leader.disk_opening import common_headers
from kvbm.tiers.disk import Slab, SlabFiles, Superblock, raise_slab_epoch, read_slab, slab_path
from kvbm.transfer.arena_layout import ArenaLayout
from tests.fast.test_disk_table import headers_of
from tests.fuzz.images import CHAINS
from tests.fuzz.steps import CHUNK, DEVICE_BLOCKS, keys_of, operate, scribble_rows, start_loop
from tests.fuzz.world import World
from tests.leaks import wait_until

SLOTS = 48
MAGIC = 0x31746C73626D766B
WANTED = Superblock(0, 1, SLOTS, CHUNK, b"f" * 32)


def slab_bytes(random: Random) -> bytes:
    """A slab that holds two chains, then changed somewhere."""
    headers = np.zeros(SLOTS, SLAB_HEADER)
    for number, chain in enumerate(CHAINS[:2]):
        keys = Keys(chain)
        first = 12 * number
        headers[first : first + len(keys)] = headers_of(keys, list(range(first, first + len(keys))))
    headers["state"], headers["fingerprint"] = 1, WANTED.short_fingerprint
    headers["payload_bytes"] = CHUNK
    for _ in range(random.choice([0, 1, 5])):
        name = random.choice(SLAB_HEADER.names)
        bits = 8 * SLAB_HEADER[name].itemsize
        value = random.choice([0, 1, (1 << bits) - 1, random.getrandbits(bits), SLOTS])
        headers[random.randrange(SLOTS)][name] = value & ((1 << bits) - 1)
    # Sealed as the compiled core seals them, so that what was changed gets behind the checksum.
    data = bytearray(WANTED.layout.total_bytes)
    page = replace(WANTED, nonce=1, epoch=random.choice([0, 1, 2**32 - 1]))
    if random.random() < 0.2:
        page = replace(page, slots=random.choice([1, SLOTS - 1, SLOTS + 1, 2**31, 2**32 - 1]))
    data[:4096] = page.pack()
    data[4096 : 4096 + headers.nbytes] = sealed(headers).tobytes()
    for _ in range(random.choice([0, 0, 1, 9])):
        data[random.randrange(len(data) if random.random() < 0.5 else 8192)] ^= 0xFF
    return bytes(data)


def sealed(headers: np.ndarray) -> np.ndarray:
    """Headers with right magic and checksum."""
    headers["magic"] = MAGIC
    headers["reserved0"] = headers["reserved1"] = 0
    for header in headers:
        header["header_checksum"] = xxh3_64(header.tobytes()[:-8], seed=MAGIC)
    return headers


def restore(world: World, random: Random) -> None:
    """A leader opens the tier: what the slabs hold is registered, then used."""
    path = slab_path(world.folder, "fuzz", 0)
    path.write_bytes(slab_bytes(random))
    found = read_slab(path)
    if random.random() < 0.3:
        raise_slab_epoch(path, random.choice([1, 2**32 - 1]))
    table = world.disk_leader(random)
    raise_epoch(table, 0 if found is None else found[0].epoch)
    if found is not None:
        assert len(found[1]) <= max(SLOTS, found[0].slots)
        assert 0 <= table.restore(common_headers([found[1], found[1]])) <= len(found[1])
    keys = keys_of(random)
    if FrequencyFilter(least=1, entries=64).passing(keys, 0, 0, len(keys)):
        table.publish([ref for ref, _ in table.reserve_run(keys, 0, len(keys), None)])
    count, ref = table.match(keys, 0, len(keys))
    if ref is not None:
        table.parent_of(table.hold_again(ref))
        assert count <= len(keys)


def adopt(world: World, random: Random) -> None:
    """A worker opens its slab: adopted or begun anew."""
    path = slab_path(world.folder, "fuzz", 0)
    path.write_bytes(slab_bytes(random))
    slab = Slab(SlabFiles(world.folder, direct=False), WANTED, "fuzz")
    try:
        size = os.fstat(slab.table_fd).st_size
        assert size == WANTED.layout.total_bytes
        assert (
            len(
                valid_headers(
                    os.pread(slab.table_fd, size, 4096)[: 128 * SLOTS],
                    rank=0,
                    fingerprint=WANTED.short_fingerprint,
                    payload_bytes=CHUNK,
                )
            )
            <= SLOTS
        )
    finally:
        slab.close()


def disk_worker(world: World, random: Random) -> None:
    """A copy thread with a disk, whose rows name slots of a slab that holds anything."""
    table = world.leader(random)
    leader = table.segment.leader
    assert leader is not None
    for _ in range(4):
        operate(world, random)
    if random.random() < 0.6:
        scribble_rows(world, random, leader)
    loop = start_loop(world, leader, 0)
    descriptor = os.memfd_create("kvbm-fuzz-slab")
    world.closing.insert(0, lambda: os.close(descriptor))
    os.pwrite(descriptor, slab_bytes(random), 0)
    layout = ArenaLayout(world.image.shape.host_slots, (CHUNK,))
    arena = np.zeros(layout.total_bytes, np.uint8)
    device = np.zeros((DEVICE_BLOCKS, CHUNK), np.uint8)
    regions = [(device.ctypes.data, CHUNK, CHUNK)]
    copier = HostCopier(regions, layout, arena.data, device_blocks=DEVICE_BLOCKS, keep_alive=device)
    backend = DiskBackend(
        world.attached[-1],
        [copier],
        data_fd=descriptor,
        table_fd=descriptor,
        layout=WANTED.layout,
        fingerprint=WANTED.short_fingerprint,
        durable=random.random() < 0.5,
        alignment=1,
    )
    thread = threading.Thread(target=backend.serve)
    thread.start()

    def stop() -> None:
        backend.stop()
        thread.join()

    world.closing.insert(1, stop)  # after the loop has ended
    loop.use_disk(backend)
    handles, world.handles = world.handles, []
    left = set(handles)

    def ended() -> bool:
        left.difference_update([handle for handle in left if table.collect(handle) is not None])
        return not left

    with contextlib.suppress(LookupError):
        wait_until(ended, 0.03)
    count, slot, _ = backend.problems()
    assert count >= 0
    assert 0 <= slot < max(1, SLOTS)


WALKS: dict[str, Callable[[World, Random], None]] = {
    "restore": restore,
    "adopt": adopt,
    "disk_worker": disk_worker,
}
