# SPDX-License-Identifier: Apache-2.0
"""The screen of `top`, as lines of text."""

from __future__ import annotations

import time
from collections.abc import Iterator

from kvbm._fast import contract
from kvbm.inspect.live import WINDOWS, LiveSegment, Rates
from kvbm.inspect.text import bar, duration, percent

OPERATIONS_SHOWN = 8


def gigabytes(rate: float) -> str:
    """A rate in bytes a second."""
    return f"{rate / 1e9:.2f} GB/s" if rate >= 1e7 else f"{rate / 1e6:.2f} MB/s"


def screen(live: LiveSegment, rates: Rates) -> list[str]:
    """All lines; reads the segment once."""
    return [
        *_head(live),
        "",
        *_fill(live),
        "",
        *_hits(rates),
        "",
        *_transfers(live, rates),
        "",
        *_participants(live),
        "",
        *_branching(live),
    ]


def _head(live: LiveSegment) -> Iterator[str]:
    age = (time.time_ns() - int(live.header["created_ns"])) / 1e9
    extra = "  RECOVERING" if live.header["recovering"] else ""
    yield f"kvbm {live.instance}  age {duration(age)}{extra}  (q ends, space stops the picture)"


def _fill(live: LiveSegment) -> Iterator[str]:
    for name, (used, total) in live.pools().items():
        yield f"{name:<8} {bar(used / total, 40)} {used:>9}/{total:<9} {percent(used / total):>7}"
    swept = live.sweep()
    names = contract.BLOCK_STATES
    states = "  ".join(f"{name} {swept.states[number]}" for number, name in names.items())
    yield f"states   {states}  held {swept.held}"


def _hits(rates: Rates) -> Iterator[str]:
    yield f"{'':<24}" + "".join(f"{f'{seconds} s':>12}" for seconds in WINDOWS)
    shares = [percent(rates.share(s, "matched_blocks", "lookup_blocks")) for s in WINDOWS]
    yield f"{'hit rate of blocks':<24}" + "".join(f"{share:>12}" for share in shares)
    for text, name in (
        ("look-ups a second", "lookups"),
        ("blocks stored a second", "blocks_stored"),
        ("blocks loaded a second", "blocks_loaded"),
        ("blocks evicted a second", "evicted"),
        ("stores skipped a second", "skipped_no_slot"),
    ):
        values = [f"{rates.per_second(seconds, name):>12.1f}" for seconds in WINDOWS]
        yield f"{text:<24}" + "".join(values)


def _transfers(live: LiveSegment, rates: Rates) -> Iterator[str]:
    for text, name in (("stored", "bytes_stored"), ("loaded", "bytes_loaded")):
        values = [f"{gigabytes(rates.per_second(seconds, name)):>12}" for seconds in WINDOWS]
        yield f"{text:<24}" + "".join(values)
    found = live.in_flight()
    yield f"operations in flight: {len(found)}"
    now = time.monotonic_ns()
    for leader, kind, state, rows, submitted in sorted(found, key=lambda f: f[4])[
        :OPERATIONS_SHOWN
    ]:
        yield (
            f"  {contract.OPERATION_KINDS.get(kind, '?'):<6} "
            f"{contract.OPERATION_STATES.get(state, '?'):<10} {rows:>4} blocks  "
            f"leader {leader}  {duration(max(0, now - submitted) / 1e9)}"
        )


def _participants(live: LiveSegment) -> Iterator[str]:
    locked = live.locks().locked
    yield "participant     pid  alive      pins    queued"
    for line in live.lines():
        record = live.participants[line]
        alive = "?" if locked is None else "yes" if line in locked else "DEAD"
        if line < contract.LEADERS:
            pins = live.swept.pins[line]
            yield f"leader {line:<3}{int(record['pid']):>9}  {alive:<5}{pins:>10}"
            continue
        leader, rank = divmod(line - contract.LEADERS, contract.RANKS)
        queued = live.queued(leader, rank) if rank < live.shape.ranks else 0
        place = f"worker {leader}.{rank}"
        yield f"{place:<10}{int(record['pid']):>9}  {alive:<5}{'':>10}{queued:>10}"


def _branching(live: LiveSegment) -> Iterator[str]:
    yield "prefixes that most others begin with"
    for children, block, position, _ in live.swept.branching:
        yield (
            f"  {live.digest(block)[:16]}  {position + 1:>6} blocks long, {children} continuations"
        )
