# SPDX-License-Identifier: Apache-2.0
"""The screen of `top`, as lines of text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kvbm.inspect.text import bar, duration, latency_lines, percent

OPERATIONS_SHOWN = 8

Row = dict[str, Any]


def gigabytes(rate: float) -> str:
    """A rate in bytes a second."""
    return f"{rate / 1e9:.2f} GB/s" if rate >= 1e7 else f"{rate / 1e6:.2f} MB/s"


def screen(frame: Row) -> list[str]:
    """All lines of one picture."""
    return [
        *_head(frame),
        "",
        *_fill(frame),
        "",
        *_hits(frame["windows"]),
        "",
        *_transfers(frame),
        *latency_lines(frame["latencies"]),
        "",
        *_participants(frame["participants"]),
        "",
        *_prefixes(frame["prefixes"]),
        *_used(frame["used"]),
    ]


def _head(frame: Row) -> Iterator[str]:
    extra = "  RECOVERING" if frame["recovering"] else ""
    age = duration(frame["age_seconds"])
    yield f"kvbm {frame['instance']}  age {age}{extra}  (q ends, space stops the picture)"


def _fill(frame: Row) -> Iterator[str]:
    for name, pool in frame["pools"].items():
        used, total = pool["used"], pool["total"]
        yield f"{name:<8} {bar(used / total, 40)} {percent(used / total):>7}  {used}/{total}"
    yield "states   " + "  ".join(f"{name} {count}" for name, count in frame["blocks"].items())
    if frame["disk"] is not None:
        states = frame["disk"]["blocks"].items()
        yield "on disk  " + "  ".join(f"{name} {count}" for name, count in states)


def _hits(windows: list[Row]) -> Iterator[str]:
    heads = [f"{window['seconds']} s" for window in windows]
    yield f"{'':<24}" + "".join(f"{head:>12}" for head in heads)
    shares = "".join(f"{percent(window['hit_rate']):>12}" for window in windows)
    yield f"{'hit rate of blocks':<24}{shares}"
    for text, name in (
        ("look-ups a second", "lookups"),
        ("blocks stored a second", "blocks_stored"),
        ("blocks loaded a second", "blocks_loaded"),
        ("blocks evicted a second", "evicted"),
        ("  to make room", "evicted_capacity"),
        ("stores skipped a second", "skipped_no_slot"),
    ):
        yield f"{text:<24}" + "".join(f"{w['per_second'][name]:>12.1f}" for w in windows)
    for text, name in (("CPU of leaders' calls", "leaders"), ("CPU of copies", "workers")):
        yield f"{text:<24}" + "".join(f"{percent(w['cpu'][name]):>12}" for w in windows)


def _transfers(frame: Row) -> Iterator[str]:
    yield from _rates(frame["windows"], "stored", "loaded")
    if frame["disk"] is not None:
        yield from _rates(frame["disk"]["windows"], "written to disk", "read from disk")
    found = frame["operations"]
    yield f"operations in flight: {len(found)}"
    for one in found[:OPERATIONS_SHOWN]:
        yield (
            f"  {one['kind']:<6} {one['state']:<10} {one['blocks']:>4} blocks  "
            f"leader {one['leader']}  {duration(one['age_seconds'])}"
        )


def _rates(windows: list[Row], stored: str, loaded: str) -> Iterator[str]:
    """How fast bytes move into a tier, and out of it."""
    for text, name in ((stored, "bytes_stored"), (loaded, "bytes_loaded")):
        rates = [gigabytes(window["per_second"][name]) for window in windows]
        yield f"{text:<24}" + "".join(f"{rate:>12}" for rate in rates)


def _participants(rows: list[Row]) -> Iterator[str]:
    yield "participant     pid  alive      pins    queued"
    for row in rows:
        alive = {None: "?", True: "yes", False: "DEAD"}[row["alive"]]
        if row["role"] == "leader":
            yield f"leader {row['leader']:<3}{row['pid']:>9}  {alive:<5}{row['pins']:>10}"
            continue
        place = f"worker {row['leader']}.{row['rank']}"
        yield f"{place:<10}{row['pid']:>9}  {alive:<5}{'':>10}{row['queued']:>10}"


def _prefixes(rows: list[Row]) -> Iterator[str]:
    yield "prefixes that most others begin with"
    for row in rows:
        length, continuations = row["blocks"], row["continuations"]
        yield f"  {row['digest'][:16]}  {length:>6} blocks long, {continuations} continuations"


def _used(rows: list[Row]) -> Iterator[str]:
    if rows:
        yield "prefixes at which most matches ended"
    for row in rows:
        yield f"  {row['digest'][:16]}  {row['blocks']:>6} blocks long, {row['matches']} matches"
