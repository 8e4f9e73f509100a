# SPDX-License-Identifier: Apache-2.0
"""Both directions at once, and what keeps them from the speed of two big copies.

``python -m bench.gpu.both [--shapes 3,4] [--count 2048]`` on a machine with a CUDA device. Each
line changes one thing about the copies of random blocks through the staging buffer: the kernel's
CTAs, the chunks, the streams, the threads that submit, the number of blocks. `of big` compares
with two big copies of as many bytes at once, in the same run. With CUDA_DEVICE_MAX_CONNECTIONS=32
in the environment no two streams share a hardware queue.
"""

from __future__ import annotations

import argparse
import os

from bench.gpu.copies import (
    COUNT,
    METHODS,
    SHAPES,
    big_copies,
    blocks_for,
    both_at_once,
    measure_lane,
)
from bench.gpu.lane import CacheShape, Lane
from kvbm.transfer.method import CopyMethod

MIB = 1 << 20
GROUP_SLOTS = 64
SHORT = ("as chosen", "whole groups, 2 streams")


def ways(shape: CacheShape) -> dict[str, CopyMethod]:
    """Return the ways of copying that are compared; a chunk of a whole group is one long copy."""
    plain = METHODS["staged"]
    group = plain._replace(chunk_bytes=GROUP_SLOTS * shape.block_bytes, streams=2, chunks_ahead=2)
    return {
        "as chosen": plain,
        "16 CTAs": plain._replace(ctas=16),
        "64 CTAs": plain._replace(ctas=64),
        "128 CTAs": plain._replace(ctas=128),
        "2 streams": plain._replace(streams=2, chunks_ahead=2),
        "3 streams": plain._replace(streams=3, chunks_ahead=3),
        "8 MiB": plain._replace(chunk_bytes=8 * MIB),
        "32 MiB, 3 streams": plain._replace(chunk_bytes=32 * MIB, streams=3, chunks_ahead=3),
        "whole groups, 2 streams": group,
    }


def show(shape: CacheShape, name: str, speeds: tuple[float, float, float], big: float) -> None:
    """Print one line."""
    print(
        f"| {shape.name} | {name} | {speeds[0]:.1f} | {speeds[1]:.1f} | {speeds[2]:.1f} "
        f"| {speeds[2] / big:.2f} |",
        flush=True,
    )


def one_lane(
    shape: CacheShape, method: CopyMethod, count: int, rounds: int
) -> tuple[float, float, float]:
    """Store, load, and both at once, in GB/s; the bytes are compared."""
    lane = Lane(shape, blocks_for(count), slots_for(count), method)
    row = measure_lane(lane, "random", rounds, (1.0, 1.0), count)
    both = both_at_once(lane, "random", rounds, count=count)
    lane.close()
    return row.store, row.load, both


def two_lanes(
    shape: CacheShape, method: CopyMethod, count: int, rounds: int
) -> tuple[float, float, float]:
    """Both at once, the stores by a thread of their own; nothing alone."""
    lanes = [Lane(shape, blocks_for(count), slots_for(count), method) for _ in range(2)]
    both = both_at_once(lanes[0], "random", rounds, stores=lanes[1], count=count)
    for lane in lanes:
        lane.close()
    return 0.0, 0.0, both


def slots_for(count: int) -> int:
    """Return the slots for two chains of `count` blocks; whole groups."""
    return 2 * count + 2 * GROUP_SLOTS


def compare(shape: CacheShape, names: tuple[str, ...], count: int, rounds: int) -> float:
    """Print the lines of one shape; returns GB/s of two big copies."""
    big = big_copies(count * shape.block_bytes, rounds)
    show(shape, f"{count} blocks: big copies", big, big[2])
    for name, method in ways(shape).items():
        if name in names:
            show(shape, f"{count} blocks: {name}", one_lane(shape, method, count, rounds), big[2])
    return big[2]


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", default="3,4", help="rows of SHAPES")
    parser.add_argument("--count", type=int, default=4 * COUNT, help="blocks of the last lines")
    parser.add_argument("--short", action="store_true", help="few lines")
    options = parser.parse_args()
    queues = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "as many as the driver likes")
    print(f"hardware queues: {queues}")
    print("| shape | how | store | load | both | of big |\n|" + "---|" * 6)
    for shape in (SHAPES[int(i)] for i in options.shapes.split(",")):
        if options.short:
            compare(shape, SHORT, COUNT, options.rounds)
            continue
        big = compare(shape, tuple(ways(shape)), COUNT, options.rounds)
        found = two_lanes(shape, METHODS["staged"], COUNT, options.rounds)
        show(shape, f"{COUNT} blocks: a thread a direction", found, big)
        compare(shape, SHORT, options.count, options.rounds)


if __name__ == "__main__":
    main()
