# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.segment``: the block table beside a table behind a mutex; prints Markdown.

Both are full, in shared memory, and hold the same chains. 1, 2 and 8 processes do the same steps on
one and then on the other, all at once: each matches a chain, evicts, reserves, publishes and
returns blocks; afterwards the same with an eviction in each reservation, which is what a full cache
does. Every step is timed in C. ``average`` and the percentiles are of wall time: where there are
more processes than cores they contain the time slices of the others. ``CPU`` is the processor time
of the same steps, which does not.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from bench.segment.build import load
from bench.segment.work import KINDS, STEPS, TABLES, Plan, Samples, memory_of, work
from bench.segments import segment

HEAD = "| processes | step | table | average | CPU | median | P99 | P99.9 |"


def measured(kind: str, name: str, plan: Plan, count: int) -> dict[str, list[Samples]]:
    """Let processes work on a full table; the samples of each."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(count), context.SimpleQueue()
    started = [
        context.Process(target=work, args=(kind, name, plan, number, barrier, results))
        for number in range(count)
    ]
    for process in started:
        process.start()
    try:
        found = [results.get() for _ in started]
    finally:
        for process in started:
            process.join(60)
            process.kill()
            process.join()
            process.close()
        results.close()
    if None in found:
        raise RuntimeError("a process failed; its message is above")
    return {step: [one[step] for one in found] for step in STEPS}


def row(count: int, step: str, kind: str, samples: list[Samples]) -> str:
    """One line of the table, in nanoseconds."""
    spent = np.concatenate([one.spent for one in samples])
    middle, p99, p999 = np.percentile(spent, (50, 99, 99.9))
    cpu = sum(one.cpu for one in samples) / len(spent)
    cells = (spent.mean(), cpu, middle, p99, p999)
    return f"| {count} | {step} | {kind} | " + " | ".join(f"{cell:,.0f}" for cell in cells) + " |"


def filled(kind: str, plan: Plan, stack: ExitStack) -> str:
    """Make a table that is full; its name."""
    if kind == "kvbm":
        name = stack.enter_context(segment(plan.blocks))
    else:
        name = f"/kvbm-bench-mutex-{os.getpid()}"
        stack.enter_context(memory_of(name, plan))
    KINDS[kind](name, plan, 900, create=True).close()
    return name


def rows(plan: Plan, processes: list[int]) -> Iterator[str]:
    """All lines; both tables are made anew for each number of processes."""
    for count in processes:
        found: dict[str, Any] = {}
        for kind in TABLES:
            with ExitStack() as stack:
                found[kind] = measured(kind, filled(kind, plan, stack), plan, count)
        for step in STEPS:
            for kind in TABLES:
                yield row(count, step, kind, found[kind][step])


def machine() -> str:
    """What it ran on."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    load_average = os.getloadavg()[0]
    return (
        f"{os.cpu_count()} cores of {model}, load average {load_average:.1f} before the run, "
        f"Linux {platform.release()}, CPython {platform.python_version()}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m bench.segment", description=__doc__)
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=200, help="calls of each step by a process")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 8])
    options = parser.parse_args(arguments)
    plan = Plan(options.blocks, min(2000, options.blocks // 4), 128, options.rounds)
    if 4 * max(options.processes) * plan.rounds * plan.call > plan.blocks:
        parser.error("more is evicted than the older half of the blocks: fewer rounds, more blocks")
    print(f"{machine()}. {plan.blocks:,} blocks, all in use; calls of {plan.call} blocks, matches")
    print(f"of {plan.chain:,}; {plan.rounds} calls of each step by each process. Nanoseconds; one")
    print(f"clock reading is in each ({load('_steps').clock_cost(100_000):.0f} ns).\n")
    print(HEAD)
    print("|--:|---|---|--:|--:|--:|--:|--:|")
    for line in rows(plan, options.processes):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
