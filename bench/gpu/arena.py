# SPDX-License-Identifier: Apache-2.0
"""Start-up of a host arena on a machine with a CUDA device.

``python -m bench.gpu.arena [--gib 32]``. How long until the first and the last slot are usable,
by threads that touch the memory; and what registering costs whoever launches kernels meanwhile.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time

import posix_ipc
import torch

from kvbm._fast.cuda_device import CudaDevice
from kvbm.tiers import host
from kvbm.tiers.host import ArenaHeader, HostArena
from kvbm.transfer.arena_layout import ArenaLayout
from kvbm.transfer.backends import register_pieces

CHUNKS = (64 << 10,) * 32
INSTANCE = "bench-arena"


def launch_times(stop: threading.Event, times: list[float]) -> None:
    """Launch a tiny kernel and wait for it, again and again."""
    x = torch.zeros(1, device="cuda")
    while not stop.is_set():
        begin = time.perf_counter()
        x.add_(1)
        torch.cuda.current_stream().synchronize()
        times.append(time.perf_counter() - begin)


def start_up(gib: int, threads: int, piece: int, launches: bool) -> dict[str, float]:
    """Make an arena, reserve and register all of it; returns seconds, and launch times in us."""
    layout = ArenaLayout((gib << 30) // sum(CHUNKS), CHUNKS)
    header = ArenaHeader(0, 1, sum(CHUNKS), 1, 0, bytes(32))
    arena = HostArena(INSTANCE, header, exclusive=False)
    memory = arena.map(layout.total_bytes)
    device = CudaDevice(0)
    host.reserve_threads = lambda: threads
    state = {"end": 0, "first": 0.0, "registering": 0.0}
    begin = time.perf_counter()

    def reserved(count: int) -> None:
        started = time.perf_counter()
        for offset, size in register_pieces(layout, int(state["end"]), count, piece):
            device.register(memory, offset, size)
            state["end"] = offset + size
            if not state["first"]:
                state["first"] = time.perf_counter() - begin
        state["registering"] += time.perf_counter() - started

    stop, times = threading.Event(), []
    launcher = threading.Thread(target=launch_times, args=(stop, times))
    if launches:
        launcher.start()
    arena.reserve(reserved, lambda: False)
    total = time.perf_counter() - begin
    stop.set()
    if launches:
        launcher.join()
    begin = time.perf_counter()
    device.close()
    closing = time.perf_counter() - begin
    arena.close()
    posix_ipc.unlink_shared_memory(arena.name)
    result = {
        "first s": state["first"],
        "all s": total,
        "registering s": state["registering"],
        "unregister s": closing,
    }
    if times:
        times.sort()
        result["launch median us"] = statistics.median(times) * 1e6
        result["launch p99 us"] = times[int(len(times) * 0.99)] * 1e6
        result["launch max us"] = times[-1] * 1e6
    return result


def main() -> None:
    """Print one line a variant."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=int, default=32)
    options = parser.parse_args()
    torch.zeros(1, device="cuda")
    variants = [(8, 1, 64), (8, 8, 64), (8, 4, 64), (8, 8, 256), (options.gib, 8, 64)]
    for gib, threads, mib in variants:
        for launches in (False, True):
            got = start_up(gib, threads, mib << 20, launches)
            print(
                f"{gib} GiB, {threads} threads, pieces of {mib} MiB: "
                + ", ".join(f"{k} {v:.3g}" for k, v in got.items()),
                flush=True,
            )


if __name__ == "__main__":
    main()
