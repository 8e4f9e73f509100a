# SPDX-License-Identifier: Apache-2.0
"""What looking costs, with a million blocks resident.

``pytest bench/bench_inspect.py``; KVBM_BENCH_BLOCKS changes the number of resident blocks.

frame
    One picture of `top` without the terminal: counters, pools, operations, a piece of the sweep.
top
    Share of a core that ``python -m kvbm.inspect top`` takes at ten pictures a second, start
    excluded: processor time of a run of some seconds less that of a short one. Printed.
show, verify, tree
    The whole command but the printing, with the capture.
baseline
    The capture alone: reading the segment's bytes.
"""

from __future__ import annotations

import os
import pty
import select
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from bench.segments import BLOCKS, CHAIN, fill, hashes, leader, segment
from kvbm._fast.keys import Keys
from kvbm.inspect import report, tree
from kvbm.inspect.capture import capture
from kvbm.inspect.decode import Segment
from kvbm.inspect.frame import frame
from kvbm.inspect.live import LiveSegment, Rates
from kvbm.inspect.top_view import screen
from kvbm.inspect.verify import check

SHORT_S, LONG_S = 0.2, 10.2


@pytest.fixture(scope="module")
def instance() -> Iterator[str]:
    with segment() as name:
        table = leader(name, 1)
        for _ in range(BLOCKS // CHAIN):
            fill(table, Keys(hashes(CHAIN)))
        yield name.removeprefix("/kvbm-")
        table.segment.close()


def test_frame(benchmark: Any, instance: str) -> None:
    with LiveSegment(instance) as live:
        rates = Rates()

        def picture() -> list[str]:
            rates.add(time.monotonic(), live.counters())
            return screen(frame(live, rates))

        assert len(benchmark(picture)) > 20


def processor_seconds(instance: str, seconds: float) -> float:
    """User and system time of a run of `top` in a terminal."""
    child, terminal = pty.fork()
    if child == 0:
        os.environ["TERM"] = "xterm"
        command = [sys.executable, "-m", "kvbm.inspect", "top", instance]
        os.execv(sys.executable, [*command, "--seconds", str(seconds)])
    try:
        while select.select([terminal], [], [], 60)[0] and os.read(terminal, 65536):
            pass
    except OSError:  # it has ended
        pass
    _, status, used = os.wait4(child, 0)
    os.close(terminal)
    assert status == 0
    return used.ru_utime + used.ru_stime


def test_top(instance: str, capsys: pytest.CaptureFixture[str]) -> None:
    long, short = (processor_seconds(instance, s) for s in (LONG_S, SHORT_S))
    share = (long - short) / (LONG_S - SHORT_S)
    with capsys.disabled():
        print(f"\ntop at 10 Hz, {BLOCKS} blocks: {100 * share:.2f} % of a core")
    assert long > short


def test_show(benchmark: Any, instance: str) -> None:
    found = benchmark.pedantic(lambda: report.summary(Segment(capture(instance))), rounds=5)
    assert found["blocks"]["registered"] == BLOCKS - BLOCKS % CHAIN


def test_verify(benchmark: Any, instance: str) -> None:
    verdict = benchmark.pedantic(lambda: check(Segment(capture(instance))), rounds=3)
    assert verdict.violations == []


def test_tree(benchmark: Any, instance: str) -> None:
    found = benchmark.pedantic(lambda: tree.tree_of(Segment(capture(instance))), rounds=3)
    assert len(found.roots) == BLOCKS // CHAIN


def test_baseline(benchmark: Any, instance: str) -> None:
    assert len(benchmark.pedantic(lambda: capture(instance).data, rounds=5)) > 96 * BLOCKS
