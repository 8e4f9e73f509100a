# SPDX-License-Identifier: Apache-2.0
"""Start-up of a host arena on a machine with a CUDA device.

``python -m bench.gpu.arena [--gib 32]``. How long until the first and the last slot are usable,
by threads that touch the memory; what registering costs whoever launches kernels meanwhile; and how
much of the memory came as huge pages, which depends on how /dev/shm is mounted. Elsewhere than on a
machine of one's own, try another mount in a namespace of its own::

    unshare -m bash -c 'mount -t tmpfs -o size=64g,huge=advise tmpfs /dev/shm &&
        python -m bench.gpu.arena --gib 32 --short'
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from pathlib import Path

import posix_ipc
import torch

from kvbm._fast.cuda_device import CudaDevice
from kvbm.tiers import host
from kvbm.tiers.host import ArenaHeader, HostArena
from kvbm.transfer.arena_layout import ArenaLayout
from kvbm.transfer.backends import register_pieces
from kvbm.transfer.numa import cpus_near

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


def huge_bytes() -> int:
    """Bytes of shared memory in huge pages."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("ShmemHugePages"))


def start_up(gib: int, threads: int, piece: int, launches: bool) -> dict[str, float]:
    """Make an arena, reserve and register all of it; returns seconds, and launch times in us."""
    layout = ArenaLayout((gib << 30) // sum(CHUNKS), CHUNKS)
    header = ArenaHeader(0, 1, sum(CHUNKS), 1, 0, bytes(32))
    arena = HostArena(INSTANCE, header, exclusive=False)
    memory = arena.map(layout.total_bytes)
    device = CudaDevice(0)
    host.reserve_threads = lambda: threads
    state = {"end": 0, "first": 0.0, "registering": 0.0}
    huge = huge_bytes()
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
    arena.reserve(reserved, lambda: False, cpus_near(device.bus_id))
    total = time.perf_counter() - begin
    stop.set()
    if launches:
        launcher.join()
    huge = huge_bytes() - huge
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
        "huge GiB": huge / (1 << 30),
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
    parser.add_argument("--short", action="store_true", help="as the library does it, only")
    options = parser.parse_args()
    torch.zeros(1, device="cuda")
    bus_id = CudaDevice(0).bus_id
    print(f"device at {bus_id}, near processors {sorted(cpus_near(bus_id)) or 'all'}")
    mounts = Path("/proc/mounts").read_text().splitlines()
    print("\n".join(line for line in mounts if " /dev/shm " in line))
    variants = [(8, 1, 64), (8, 8, 64), (8, 4, 64), (8, 8, 256), (options.gib, 8, 64)]
    if options.short:
        variants = [(8, host.RESERVE_THREADS_MAX, 64), (options.gib, host.RESERVE_THREADS_MAX, 64)]
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
