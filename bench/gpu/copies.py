# SPDX-License-Identifier: Apache-2.0
"""Copies between a CUDA device and the host arena: raw ceilings and ours, in one run.

``python -m bench.gpu.copies [--quick] [--json FILE]`` on a machine with a CUDA device. Each figure
is the median of several rounds, in GB/s (10^9 bytes). `of big` compares with one copy of as many
bytes between pinned memory and the device in the same run; `CPU` is the time of the copy thread in
submissions, a block. The bytes are compared on the device once for each row of the table.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.gpu.lane import CacheShape, Lane
from kvbm.transfer.method import (
    CHUNK_BYTES,
    CHUNKS_AHEAD,
    SEGMENTS,
    STAGED_CHUNKS_AHEAD,
    STAGED_STREAMS,
    STREAMS,
    CopyMethod,
)

COUNT = 512
BLOCKS = 1100
SLOTS = 1152
SHAPES = (
    CacheShape("8B bf16, a tensor a layer", 32, 64 << 10),
    CacheShape("8B bf16, one slab", 32, 64 << 10, slab=True),
    CacheShape("8B fp8, a tensor a layer", 32, 32 << 10),
    CacheShape("70B/TP8 bf16, a tensor a layer", 80, 8 << 10),
    CacheShape("MLA, a tensor a layer", 61, 18 << 10),
    CacheShape("MLA, one slab", 61, 18 << 10, slab=True),
    CacheShape("8B bf16, cross-layer", 1, 2 << 20),
    CacheShape("70B/TP8 bf16, one slab", 80, 8 << 10, slab=True),
)
ALWAYS = 1 << 62
METHODS = {
    "batch": CopyMethod(0, 0, SEGMENTS, CHUNK_BYTES, CHUNKS_AHEAD, STREAMS),
    "pitched": CopyMethod(1, ALWAYS, SEGMENTS, CHUNK_BYTES, CHUNKS_AHEAD, STREAMS),
    "staged": CopyMethod(
        pitch_bytes=0,
        pitched_below_bytes=0,
        segments=SEGMENTS,
        chunk_bytes=CHUNK_BYTES,
        chunks_ahead=STAGED_CHUNKS_AHEAD,
        streams=STAGED_STREAMS,
        staged_loads_below_bytes=ALWAYS,
        staged_stores_below_bytes=ALWAYS,
    ),
}
METHODS["stores staged"] = METHODS["staged"]._replace(staged_loads_below_bytes=0)
PATTERNS = ("runs", "descending", "random")
SWEEP = tuple(
    CopyMethod(0, 0, segments, mib << 20, ahead, streams)
    for segments, mib, ahead, streams in (
        (256, 16, 2, 1),
        (256, 16, 1, 1),
        (256, 8, 2, 2),
        (256, 16, 2, 2),
        (256, 16, 3, 2),
        (256, 32, 2, 2),
        (128, 16, 2, 2),
    )
)
STAGED_SWEEP = tuple(
    METHODS["staged"]._replace(chunk_bytes=mib << 20, chunks_ahead=ahead, streams=streams, ctas=n)
    for mib, ahead, streams, n in (
        (16, 2, 2, 8),
        (16, 2, 2, 16),
        (16, 2, 2, 32),
        (8, 2, 2, 32),
        (8, 4, 4, 32),
        (16, 3, 3, 32),
        (16, 4, 4, 16),
        (16, 4, 4, 32),
    )
)
BESIDE_SWEEP = (
    *(
        METHODS["staged"]._replace(chunk_bytes=mib << 20, chunks_ahead=ahead, streams=ahead)
        for mib, ahead in ((16, 4), (16, 1), (8, 2), (4, 4), (4, 2), (2, 2))
    ),
    METHODS["batch"],
    METHODS["batch"]._replace(chunks_ahead=1, streams=1),
)
SHORT_PIECES = SHAPES[3]


@dataclass
class Row:
    """One line of the table; speeds in GB/s, CPU in microseconds a block."""

    shape: str
    method: str
    pattern: str
    store: float
    load: float
    store_of_big: float
    load_of_big: float
    store_cpu_us: float
    load_cpu_us: float


def median_of(rounds: int, measure: Callable[[], float]) -> float:
    """Run once to warm up, then return the median."""
    measure()
    return statistics.median(measure() for _ in range(rounds))


def big_copies(size: int, rounds: int) -> tuple[float, float, float]:
    """GB/s of one copy to the host, one to the device, and of both at once (sum)."""
    device = torch.empty(2, size, dtype=torch.uint8, device="cuda")
    host = torch.empty(2, size, dtype=torch.uint8, pin_memory=True)
    streams = [torch.cuda.Stream() for _ in range(2)]

    def run(directions: str) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        if "store" in directions:
            with torch.cuda.stream(streams[0]):
                host[0].copy_(device[0], non_blocking=True)
        if "load" in directions:
            with torch.cuda.stream(streams[1]):
                device[1].copy_(host[1], non_blocking=True)
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    seconds = [median_of(rounds, lambda d=d: run(d)) for d in ("store", "load", "store load")]
    return size / seconds[0] / 1e9, size / seconds[1] / 1e9, 2 * size / seconds[2] / 1e9


def device_blocks(pattern: str, seed: int, count: int = COUNT) -> tuple[list[int], list[int]]:
    """Return two disjoint sets of `count` of `blocks_for` device blocks."""
    blocks = list(range(blocks_for(count)))
    if pattern == "runs":
        return blocks[:count], blocks[-count:]
    if pattern == "descending":  # as an engine hands out the blocks of finished requests
        return blocks[:count][::-1], blocks[-count:][::-1]
    random.Random(seed).shuffle(blocks)
    return blocks[:count], blocks[count : 2 * count]


def blocks_for(count: int) -> int:
    """Blocks of a KV cache of which `count` are stored and as many others loaded."""
    return BLOCKS * count // COUNT


def cpu_us(lane: Lane, copy: Callable[[], float]) -> tuple[float, float]:
    """Seconds of a copy and microseconds of submission a block."""
    before = lane.backend.statistics()
    seconds = copy()
    after = lane.backend.statistics()
    blocks = max(1, after["blocks"] - before["blocks"])
    return seconds, (after["submit_ns"] - before["submit_ns"]) / 1e3 / blocks


def method_name(method: CopyMethod) -> str:
    """Return what a method is called in the tables."""
    if method.pitch_bytes:
        return "pitched"
    if method.staged_loads_below_bytes:
        return "staged"
    return "stores staged" if method.staged_stores_below_bytes else "batch"


def measure_lane(
    lane: Lane, pattern: str, rounds: int, big: tuple[float, float], count: int = COUNT
) -> Row:
    """Store and load `count` blocks several times; the bytes are compared in the first round."""
    size = count * lane.shape.block_bytes
    stores, loads = [], []
    for number in range(rounds + 1):
        sources, targets = device_blocks(pattern, number, count)
        keys, handles = lane.plan_store(sources)
        stores.append(cpu_us(lane, lambda h=handles: lane.timed(h)))
        lane.collect(handles)
        if number == 0:
            lane.poison(targets)
        ref, handles = lane.plan_load(keys, targets)
        loads.append(cpu_us(lane, lambda h=handles: lane.timed(h)))
        lane.collect(handles)
        lane.table.unpin(ref)
        if number == 0 and not torch.equal(lane.snapshot(sources), lane.snapshot(targets)):
            raise RuntimeError(f"{lane.shape}, {pattern}: other bytes came back")
        lane.table.reset()
    store, load = (
        [statistics.median(values) for values in zip(*some[1:], strict=True)]
        for some in (stores, loads)
    )
    speeds = size / store[0] / 1e9, size / load[0] / 1e9
    return Row(
        shape=lane.shape.name,
        method=method_name(lane.method),
        pattern=pattern,
        store=speeds[0],
        load=speeds[1],
        store_of_big=speeds[0] / big[0],
        load_of_big=speeds[1] / big[1],
        store_cpu_us=store[1],
        load_cpu_us=load[1],
    )


def both_at_once(
    lane: Lane, pattern: str, rounds: int, *, stores: Lane | None = None, count: int = COUNT
) -> float:
    """GB/s (sum) of a load and a store of `count` blocks each, released together.

    The stores may have a lane, and so a copy thread, of their own.
    """
    size = 2 * count * lane.shape.block_bytes
    sources, targets = device_blocks(pattern, 99, count)
    keys, handles = lane.plan_store(sources)
    lane.timed(handles)
    lane.collect(handles)
    other = stores or lane

    def once() -> float:
        ref, loaded = lane.plan_load(keys, targets)
        _, stored = other.plan_store(sources)
        begin = time.perf_counter()
        if stores is not None:
            stores.release()
        lane.release()
        lane.wait(loaded)
        other.wait(stored)
        seconds = time.perf_counter() - begin
        lane.collect(loaded)
        other.collect(stored)
        lane.table.unpin(ref)
        return seconds

    seconds = median_of(min(rounds, 5), once)
    lane.table.reset()
    return size / seconds / 1e9


def work(kind: str) -> Callable[[], None]:
    """Return what the engine's stream does meanwhile: about 15 ms of it."""
    if kind == "prefill GEMM 8192^3":
        a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))

        def gemms() -> None:
            for _ in range(10):
                torch.matmul(a, b)

        return gemms
    weights = [torch.randn(4096, 14336, dtype=torch.bfloat16, device="cuda") for _ in range(24)]
    x = torch.randn(32, 4096, dtype=torch.bfloat16, device="cuda")
    for weight in weights:
        torch.matmul(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            torch.matmul(x, weight)

    def replays() -> None:
        for _ in range(12):
            graph.replay()

    return replays


def slowdown(lane: Lane, kind: str, direction: str, rounds: int) -> tuple[float, float, float]:
    """Milliseconds of the work alone and beside a copy, and the copy's GB/s meanwhile."""
    launch = work(kind)
    sources, targets = device_blocks("random", 7)
    keys, handles = lane.plan_store(sources)
    lane.timed(handles)
    lane.collect(handles)

    def run(with_copy: bool) -> tuple[float, float]:
        ref, operations = None, []
        if with_copy and direction == "load":
            ref, operations = lane.plan_load(keys, targets)
        elif with_copy:
            _, operations = lane.plan_store(sources)
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started = time.perf_counter()
        lane.release()
        begin.record()
        launch()
        end.record()
        lane.wait(operations)
        copied = time.perf_counter() - started
        torch.cuda.synchronize()
        lane.collect(operations)
        if ref is not None:
            lane.table.unpin(ref)
        if direction == "store" and with_copy:
            lane.table.reset()
        return begin.elapsed_time(end), copied

    alone = statistics.median(run(False)[0] for _ in range(rounds + 1))
    beside = [run(True) for _ in range(rounds + 1)][1:]
    lane.table.reset()
    speed = COUNT * lane.shape.block_bytes / statistics.median(b[1] for b in beside) / 1e9
    return alone, statistics.median(b[0] for b in beside), speed


def show(rows: list[Row]) -> None:
    """Print the table."""
    print("| shape | method | blocks | store | load | store/big | load/big | CPU us store | load |")
    print("|---|---|---|---|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r.shape} | {r.method} | {r.pattern} | {r.store:.1f} | {r.load:.1f} "
            f"| {r.store_of_big:.2f} | {r.load_of_big:.2f} | {r.store_cpu_us:.1f} "
            f"| {r.load_cpu_us:.1f} |"
        )


def small_copy_us(lane: Lane, direction: str, pattern: str, way: str) -> tuple[float, float]:
    """Median and greatest time of a small copy and its wait while blocks are copied.

    `way` is "out" for 4 bytes to the host, as sampled tokens are, or "in" for 256 KiB to the
    device, as block tables are.
    """
    sources, targets = device_blocks(pattern, 5)
    keys, handles = lane.plan_store(sources)
    lane.timed(handles)
    lane.collect(handles)
    ref = None
    if direction == "load":
        ref, handles = lane.plan_load(keys, targets)
    else:
        _, handles = lane.plan_store(sources)
    size = 1 if way == "out" else 1 << 16
    device, host = torch.zeros(size, device="cuda"), torch.zeros(size, pin_memory=True)
    target, source = (host, device) if way == "out" else (device, host)
    stream, times = torch.cuda.Stream(), []
    torch.cuda.synchronize()
    lane.release()
    with torch.cuda.stream(stream):
        while not all(lane.loop.rank_ended(handle) for handle in handles):
            begin = time.perf_counter()
            target.copy_(source, non_blocking=True)
            stream.synchronize()
            times.append(time.perf_counter() - begin)
    lane.collect(handles)
    if ref is not None:
        lane.table.unpin(ref)
    lane.table.reset()
    return statistics.median(times) * 1e6, max(times) * 1e6


def sweep(rounds: int, shapes: tuple[CacheShape, ...], methods: tuple[CopyMethod, ...]) -> None:
    """Speeds, and how long the engine's own small copies take, by the way of submission."""
    print("\nmedian, greatest us of a small copy (4 B out, 256 KiB in) beside a store, a load")
    print(
        "| shape | method | segments | chunk MiB | ahead | streams | CTAs | blocks | store | load "
        "| out, store | in, store | out, load | in, load |"
    )
    print("|" + "---|" * 14)
    for shape in shapes:
        for method in methods:
            lane = Lane(shape, BLOCKS, SLOTS, method)
            for pattern in ("runs", "random"):
                row = measure_lane(lane, pattern, rounds, (1.0, 1.0))
                small = [
                    small_copy_us(lane, direction, pattern, way)
                    for direction in ("store", "load")
                    for way in ("out", "in")
                ]
                print(
                    f"| {shape.name} | {row.method} | {method.segments} "
                    f"| {method.chunk_bytes >> 20} | {method.chunks_ahead} | {method.streams} "
                    f"| {method.ctas} | {pattern} | {row.store:.1f} | {row.load:.1f} | "
                    + " | ".join(f"{a:.0f}, {b:.0f}" for a, b in small)
                    + " |",
                    flush=True,
                )
            lane.close()


def beside(rounds: int, pairs: Sequence[tuple[CacheShape, CopyMethod | None]]) -> dict[str, object]:
    """Print how much other work slows down beside copies of random blocks."""
    found: dict[str, object] = {}
    print(
        "\n| shape | method | chunk MiB | ahead | streams | CTAs | work | direction | alone ms "
        "| beside ms | slow-down | GB/s | lost ms a GB |"
    )
    print("|" + "---|" * 13)
    for shape, method in pairs:
        lane = Lane(shape, BLOCKS, SLOTS, method)
        for kind in ("prefill GEMM 8192^3", "decode graph M=32"):
            for direction in ("store", "load"):
                alone, slowed, speed = slowdown(lane, kind, direction, rounds)
                name = (
                    f"{shape.name} | {method_name(method)} | {method.chunk_bytes >> 20} "
                    f"| {method.chunks_ahead} | {method.streams} | {method.ctas} | {kind} "
                    f"| {direction}"
                )
                lost = (slowed / alone - 1) / speed * 1e3
                print(
                    f"| {name} | {alone:.2f} | {slowed:.2f} | {slowed / alone:.3f} | {speed:.1f} "
                    f"| {lost:.2f} |",
                    flush=True,
                )
                found[f"beside {name}"] = [alone, slowed, speed]
        lane.close()
    return found


def main() -> None:
    """Run everything and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--no-table", action="store_true")
    parser.add_argument("--shapes", default="0,1,2,3,4,5,6", help="rows of SHAPES for the table")
    parser.add_argument("--no-beside", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--staged-sweep", action="store_true")
    parser.add_argument("--beside-sweep", action="store_true", help="chunks, and nothing else")
    options = parser.parse_args()
    if options.beside_sweep:
        pairs = [(SHAPES[0], method) for method in BESIDE_SWEEP]
        beside(options.rounds, [*pairs, (SHORT_PIECES, METHODS["staged"])])
        return
    rows: list[Row] = []
    extra: dict[str, object] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    chosen = () if options.no_table else map(int, options.shapes.split(","))
    for shape in (SHAPES[i] for i in chosen):
        size = COUNT * shape.block_bytes
        big = big_copies(size, options.rounds)
        print(
            f"{shape.name}: big copies {big[0]:.1f} / {big[1]:.1f}, both {big[2]:.1f}", flush=True
        )
        for name in ("batch", "pitched") if shape.slab else ("batch", "staged", "stores staged"):
            lane = Lane(shape, BLOCKS, SLOTS, METHODS[name])
            for pattern in PATTERNS:
                rows.append(measure_lane(lane, pattern, options.rounds, big[:2]))
                both = both_at_once(lane, pattern, options.rounds)
                print(f"  {name}, {pattern}: both at once {both:.1f} = {both / big[2]:.2f}")
                extra[f"both {shape.name} {name} {pattern}"] = [both, big[2]]
            lane.close()
    if rows:
        show(rows)
    both_ways = [(SHAPES[i], METHODS[name]) for i in (0, 3) for name in ("batch", "staged")]
    both_ways += [(SHAPES[0], METHODS["stores staged"])]
    # Slower stores disturb less: one chunk on its way instead of two.
    both_ways += [(SHAPES[0], METHODS["batch"]._replace(chunks_ahead=1, streams=1))]
    if not options.no_beside:
        extra |= beside(options.rounds, both_ways)
    if options.sweep:
        sweep(options.rounds, (SHAPES[0], SHAPES[4]), SWEEP)
    if options.staged_sweep:
        sweep(options.rounds, (SHAPES[3], SHAPES[4]), STAGED_SWEEP)
        beside(options.rounds, [(SHAPES[3], method) for method in STAGED_SWEEP])
    if options.json:
        options.json.write_text(json.dumps({"rows": [asdict(r) for r in rows], **extra}, indent=1))


if __name__ == "__main__":
    main()
