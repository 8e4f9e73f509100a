# SPDX-License-Identifier: Apache-2.0
"""What the same disk gives without kvbm: threads that call ``preadv``, and fio."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

from kvbm.tiers.disk import Slab

__all__ = ["FIO_ENGINES", "PlainDisk", "fio"]

FIO_ENGINES = ("psync", "libaio", "io_uring")


class PlainDisk:
    """Blocks of a slab that nobody else writes.

    Parameters
    ----------
    slab : Slab
        Where they are.
    slots : list of list of int
        Two halves, read or written in turn.
    memory : memoryview
        As large as one half.
    threads : int
        Threads that read and write.
    written : bool
        The slots have been written; they are now otherwise, so that no read meets a hole.
    """

    def __init__(
        self,
        slab: Slab,
        slots: list[list[int]],
        memory: memoryview,
        threads: int,
        *,
        written: bool = False,
    ) -> None:
        self._slab, self._slots, self._memory = slab, list(slots), memory
        self._threads = threads
        for _ in () if written else slots:
            self.write()

    def _each(self, call: Callable[..., int], sync_every: int = 0) -> None:
        todo = iter(list(enumerate(self._slots[0])))
        lock = threading.Lock()
        size = self._slab.superblock.payload_bytes
        layout, fd = self._slab.layout, self._slab.data_fd

        def run() -> None:
            while True:
                with lock:
                    block, slot = next(todo, (-1, -1))
                if block < 0:
                    return
                with self._memory[block * size : (block + 1) * size] as piece:
                    done = call(fd, [piece], layout.data_offset + slot * layout.stride)
                if done != size:
                    raise RuntimeError(f"{done} of {size} bytes were moved")
                if sync_every and (block + 1) % sync_every == 0:
                    os.fdatasync(fd)

        threads = [threading.Thread(target=run) for _ in range(self._threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._slots.reverse()

    def read(self) -> None:
        """Read one half of the blocks, the other one the next time."""
        self._each(os.preadv)

    def write(self, sync_every: int = 0) -> None:
        """Write one half of the blocks, with a sync after each so many."""
        self._each(os.pwritev, sync_every)


def fio(folder: Path, mib: int, block_bytes: int, depth: int, kind: str, engine: str) -> float:
    """MB/s of fio's random reads or writes (`kind`) of one file; 0 where it is not installed."""
    program = shutil.which("fio")
    if program is None:
        return 0.0
    path = folder / f"kvbm-bench-{os.getpid()}.fio"
    many = [f"--numjobs={depth}"] if engine == "psync" else [f"--iodepth={depth}"]
    command = [
        program,
        "--name=kvbm",
        f"--filename={path}",
        f"--size={mib}M",
        f"--bs={block_bytes}",
        f"--rw=rand{kind}",
        "--direct=1",
        "--thread",
        "--overwrite=1",  # written before, as the slab is
        "--norandommap",
        "--group_reporting",
        "--time_based",
        "--runtime=2",
        f"--ioengine={engine}",
        "--output-format=json",
        *many,
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    finally:
        path.unlink(missing_ok=True)
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    return float(job[kind]["bw_bytes"]) / 1e6
