# SPDX-License-Identifier: Apache-2.0
"""Compile and load the simulated CUDA driver, ``fake_cuda.c``."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("fake_cuda.c")
TOP = Path(__file__).resolve().parent.parent.parent
HEADER = TOP / "kvbm" / "_fast" / "cuda_staging.h"
BUILD = TOP / "build" / "fake_cuda"


def _library() -> Path:
    """Return the library's path; compiled if it is not there yet."""
    digest = hashlib.sha256(SOURCE.read_bytes() + HEADER.read_bytes()).hexdigest()
    target = BUILD / f"{digest[:16]}.so"
    if not target.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        draft = target.with_suffix(f".{os.getpid()}")
        command = ["cc", "-std=gnu11", "-O1", "-shared", "-fPIC", "-pthread"]
        command += ["-I", str(HEADER.parent), "-o"]
        subprocess.run([*command, str(draft), str(SOURCE)], check=True)
        draft.rename(target)
    return target


class FakeCuda:
    """The test's side of the simulated driver; one a process, as the real one."""

    def __init__(self, *, batches: bool = True) -> None:
        self.path = str(_library())
        self._library = ctypes.CDLL(self.path)
        self._library.fake_reset(int(batches))

    def allocation(self, address: int, count: int) -> None:
        """Say that ``count`` bytes of host memory are one allocation of the device."""
        self._library.fake_allocation(ctypes.c_void_p(address), ctypes.c_size_t(count))

    def hold_engine(self, on: bool) -> None:
        """Put a long kernel on the engine's stream, or let it end."""
        self._library.fake_hold(int(on))

    def hold_kernel(self, number: int) -> None:
        """Let kernel ``number`` of the package, counted from 1, not begin; 0 lets all."""
        self._library.fake_hold_kernel(number)

    def ignore_waits(self) -> None:
        """Make waits for events have no effect, as if nobody asked for them."""
        self._library.fake_ignore_waits(1)

    def kernel(self, address: int, count: int, value: int) -> None:
        """Put a kernel on the engine's stream that fills memory with one byte value."""
        self._library.fake_kernel(ctypes.c_void_p(address), value, ctypes.c_size_t(count))

    def run(self) -> None:
        """Let everything run that may."""
        self._library.fake_run()

    def fail(self, symbol: str, *, error: int, after: int = 0, times: int = 1) -> None:
        """Make a function fail ``times`` times, after ``after`` more good calls."""
        self._library.fake_fail(symbol.encode(), after, times, error)

    def costs(self, *, piece: float = 0.0, kernel: float = 0.0, pitched: float = 0.0) -> None:
        """Say how many seconds a piece of a batch, a kernel and a 2D copy take to submit."""
        self._library.fake_costs(
            *(ctypes.c_int64(int(cost * 1e9)) for cost in (piece, kernel, pitched))
        )

    @property
    def alive(self) -> int:
        """What was made on the device, or registered with it, and still exists."""
        return int(self._library.fake_alive())
