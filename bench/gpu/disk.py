# SPDX-License-Identifier: Apache-2.0
"""From disk to the device through the disk tier, beside the disk and the link alone, in one run.

``python -m bench.gpu.disk [--folder DIR]`` on a machine with a CUDA device; with ``--device cpu``
the same path with tensors in host memory. A leader and a worker as an engine has them: a chain of
blocks that is on disk alone is asked for, brought to the host tier, and loaded to other device
blocks, where its bytes are compared, in each round. GB/s (10^9 bytes), medians:

plain
    Threads that call ``preadv`` with O_DIRECT on the same slots of the same file, in random order.
disk to host
    From the request's first question until all of its blocks are in the host tier.
host to device
    From there until the request is told that they are on the device.
disk to device
    Both, one after the other, as a request meets them.
device to disk
    Until all of a chain that was stored is on disk.

Then what NIXL's backends can do here: bench/gpu/gds.py.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from bench.disk.plain import PlainDisk
from bench.gpu import gds
from bench.gpu.disk_engine import CHAINS, DiskEngine
from bench.gpu.lane import CacheShape, shared_memory
from kvbm.errors import ConfigError
from kvbm.transfer.nixl import NIXL_BACKENDS, nixl_library
from kvbm.worker.disk import IO_THREADS

SHAPES = (
    CacheShape("8B bf16, cross-layer", 1, 2 << 20),
    CacheShape("8B bf16, a tensor a layer", 32, 64 << 10),
    CacheShape("70B/TP8 bf16, a tensor a layer", 80, 8 << 10),
)
COLUMNS = (
    "KV cache",
    "moved by",
    "plain",
    "disk to host",
    "of plain",
    "host to device",
    "disk to device",
    "device to disk",
)


def ways() -> dict[str, tuple[str, ...]]:
    """What may move the bytes: plain calls, and NIXL's backends where it is installed."""
    found: dict[str, tuple[str, ...]] = {"preadv": ()}
    try:
        nixl_library()
    except ConfigError as error:
        print(f"without NIXL: {error}\n")
        return found
    return found | {f"NIXL {kind}": (kind,) for kind in reversed(NIXL_BACKENDS)}


def median_rate(count: int, seconds: list[float]) -> float:
    """GB/s of the median."""
    return count / statistics.median(seconds) / 1e9


def measured(engine: DiskEngine, rounds: int) -> list[str]:
    """The figures of one engine; rounds of plain reads and of the tier alternate."""
    size = engine.blocks * engine.shape.block_bytes
    slots = np.random.default_rng(2).permutation(CHAINS * engine.blocks)
    memory = shared_memory(size)
    with memoryview(memory) as view:
        halves = slots.reshape(CHAINS, engine.blocks).tolist()
        plain = PlainDisk(engine.slab, halves, view, IO_THREADS, written=True)
        read, found, loaded = [], [], []
        for number in range(rounds + 1):
            began = time.perf_counter()
            plain.read()
            read.append(time.perf_counter() - began)
            secs = engine.load(number % CHAINS)
            found.append(secs[0])
            loaded.append(secs[1])
    memory.close()
    counters = engine.counters()
    if counters["loads_failed"] or counters["blocks_loaded"] != (rounds + 1) * engine.blocks:
        raise RuntimeError(f"not all blocks came from disk: {counters}")
    rates = [median_rate(size, some[1:]) for some in (read, found, loaded)]
    both = [sum(pair) for pair in zip(found[1:], loaded[1:], strict=True)]
    ratio = statistics.median(r / f for r, f in zip(read[1:], found[1:], strict=True))
    return [
        *(f"{rate:.2f}" for rate in rates[:2]),
        f"{ratio:.2f}",
        f"{rates[2]:.2f}",
        f"{median_rate(size, both):.2f}",
        f"{median_rate(size, engine.store_secs):.2f}",
    ]


def row_of(
    name: str, nixl: tuple[str, ...], shape: CacheShape, o: argparse.Namespace
) -> list[str] | None:
    """One line of the table; None if NIXL's backend cannot be used, which the log explains."""
    blocks = max(1, (o.mib << 20) // shape.block_bytes)
    with closing(DiskEngine(shape, blocks, o.folder, o.device, nixl)) as engine:
        if nixl and engine.nixl_backend is None:
            return None
        figures = measured(engine, o.rounds)
        moved = (CHAINS + o.rounds + 1) * blocks
        if nixl and engine.nixl_blocks != moved:
            name += f" ({engine.nixl_blocks} of {moved} blocks)"
    return [shape.name, name, *figures]


def main(arguments: list[str] | None = None) -> int:
    """Print the table, then what the probe found."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.disk", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="on the disk")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--mib", type=int, default=1024, help="size of a chain")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--probe", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args(arguments)
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")  # read when the library is imported
    device = torch.cuda.get_device_name() if options.device == "cuda" else "host memory"
    print(f"{device}, torch {torch.__version__}, {platform.system()} {platform.release()}\n")
    for cells in (COLUMNS, ["---"] * len(COLUMNS)):
        print(f"| {' | '.join(cells)} |")
    began = time.perf_counter()
    unusable = []
    for name, nixl in ways().items():
        for shape in SHAPES:
            row = row_of(name, nixl, shape, options)
            if row is None:
                unusable.append(name)
                break
            print(f"| {' | '.join(row)} |", flush=True)
    for name in unusable:
        print(f"\n{name} cannot be used by the tier here")
    print(f"\n{time.perf_counter() - began:.0f} s\n")
    if options.probe:
        gds.report(argparse.Namespace(folder=options.folder, device=options.device, mib=256))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
