# SPDX-License-Identifier: Apache-2.0
"""One picture of a live segment, as plain values: what `top` draws and `serve` sends."""

from __future__ import annotations

import time
from typing import Any

from kvbm._fast import contract
from kvbm.inspect.latency import latency_rows
from kvbm.inspect.live import LEADER_CPU, WINDOWS, LiveSegment, Rates, Sweep

Row = dict[str, Any]


Followed = tuple[LiveSegment, Rates]


def frame(live: LiveSegment, rates: Rates, disk: Followed | None = None) -> Row:
    """Read the segment once, with the next piece of the sweep over its block table.

    Parameters
    ----------
    live : LiveSegment
        The segment.
    rates : Rates
        Of its counters; the caller adds the samples.
    disk : tuple, optional
        The same two of the instance's disk tier.

    Returns
    -------
    dict
        Values that JSON can carry: `instance`, `age_seconds`, `recovering`, `pools` (name to `used`
        and `total`), `blocks` (state to number, and `held`), `windows` (`seconds`, `hit_rate`,
        `per_second` of each counter, `cpu`: cores that `leaders`' calls and the copies of
        `workers` took), `operations`, the oldest first, `participants`, `prefixes`,
        `used` (prefixes at which most matches ended), `latencies` (of all transfers so far);
        `disk`: `blocks` and `windows` of the disk tier, None if there is none.
    """
    swept = live.sweep()
    pools = live.pools()
    if disk is not None:
        pools["disk"] = disk[0].pools()["host"]
    return {
        "instance": live.instance,
        "age_seconds": (time.time_ns() - int(live.header["created_ns"])) / 1e9,
        "recovering": bool(live.header["recovering"]),
        "pools": {name: {"used": used, "total": total} for name, (used, total) in pools.items()},
        "blocks": _blocks(swept),
        "windows": [_window(rates, seconds) for seconds in WINDOWS],
        "operations": _operations(live),
        "participants": _participants(live),
        "prefixes": [
            {"digest": live.digest(block), "blocks": position + 1, "continuations": children}
            for children, block, position, _ in swept.branching
        ],
        "used": [
            {"digest": live.digest(block), "blocks": position + 1, "matches": matches}
            for matches, block, position in swept.used
        ],
        "latencies": latency_rows(live.histograms()),
        "disk": None if disk is None else _disk(*disk),
    }


def _blocks(swept: Sweep) -> Row:
    found = {name: swept.states[state] for state, name in contract.BLOCK_STATES.items()}
    return found | {"held": swept.held}


def _disk(live: LiveSegment, rates: Rates) -> Row:
    return {
        "blocks": _blocks(live.sweep()),
        "windows": [_window(rates, seconds) for seconds in WINDOWS],
    }


def _window(rates: Rates, seconds: int) -> Row:
    elapsed, moved = rates.moved(seconds)
    per_second = {name: value / elapsed if elapsed > 0 else 0.0 for name, value in moved.items()}
    calls = per_second.pop(LEADER_CPU)
    return {
        "seconds": seconds,
        "hit_rate": rates.share(seconds, "matched_blocks", "lookup_blocks"),
        "per_second": per_second,
        "cpu": {"leaders": calls / 1e9, "workers": (per_second["cpu_ns"] - calls) / 1e9},
    }


def _operations(live: LiveSegment) -> list[Row]:
    now = time.monotonic_ns()
    return [
        {
            "leader": leader,
            "kind": contract.OPERATION_KINDS.get(kind, "?"),
            "state": contract.OPERATION_STATES.get(state, "?"),
            "blocks": rows,
            "age_seconds": max(0, now - submitted) / 1e9,
        }
        for leader, kind, state, rows, submitted in sorted(live.in_flight(), key=lambda f: f[4])
    ]


def _participants(live: LiveSegment) -> list[Row]:
    locked = live.locks().locked
    found = []
    for line in live.lines():
        row: Row = {
            "role": "leader",
            "leader": line,
            "rank": None,
            "pid": int(live.participants[line]["pid"]),
            "alive": None if locked is None else line in locked,
            "pins": None,
            "queued": None,
        }
        if line < contract.LEADERS:
            row["pins"] = live.swept.pins[line]
        else:
            leader, rank = divmod(line - contract.LEADERS, contract.RANKS)
            queued = live.queued(leader, rank) if rank < live.shape.ranks else 0
            row |= {"role": "worker", "leader": leader, "rank": rank, "queued": queued}
        found.append(row)
    return found
