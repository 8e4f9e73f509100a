# SPDX-License-Identifier: Apache-2.0
"""What a replay found: as tables for a reader, as JSON for a program."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from kvbm.eviction.policy import LRU
from kvbm.replay.manager import CALLS, Outcome
from kvbm.replay.trace import Trace

PERCENTILES = (50.0, 99.0, 99.9)


class Comparison(NamedTuple):
    """One capacity: the outcome, and hits of other policies by name."""

    outcome: Outcome
    others: dict[str, int]


def latencies(outcome: Outcome) -> dict[str, list[float]]:
    """Microseconds of each call at `PERCENTILES`."""
    return {
        call: [round(float(us), 3) for us in np.percentile(outcome.latency_us[call], PERCENTILES)]
        for call in CALLS
    }


def as_dict(trace: Trace, comparisons: list[Comparison], policy: str = LRU) -> dict[str, Any]:
    """Everything, ready for JSON. Rates are 0 to 1, times microseconds."""
    return {
        "trace": {
            "name": trace.name,
            "requests": len(trace.requests),
            "references": trace.references,
            "distinct_blocks": trace.distinct,
        },
        "policy": policy,
        "percentiles": PERCENTILES,
        "capacities": [_entry(comparison) for comparison in comparisons],
    }


def _entry(comparison: Comparison) -> dict[str, Any]:
    outcome = comparison.outcome
    return {
        "blocks": outcome.capacity,
        "hit_rate": outcome.hit_rate,
        "hits_by_tier": {"host": outcome.host_hits}
        | ({} if outcome.disk is None else {"disk": outcome.disk.hits}),
        "disk": None if outcome.disk is None else outcome.disk._asdict(),
        "hit_rate_of": {
            name: hits / outcome.references for name, hits in comparison.others.items()
        },
        "stored": outcome.stored,
        "evicted": outcome.evicted,
        "skipped": outcome.skipped,
        "references_s": round(outcome.references_s),
        "latency_us": latencies(outcome),
        "decisions": outcome.decisions,
    }


def _tiers(comparisons: list[Comparison], block_bytes: int | None) -> Table:
    """What each tier hit, and what moved between them."""
    table = Table(title="tiers (hits in % of the references)")
    moved = "blocks" if block_bytes is None else "GB"
    for column in ("host", "disk", "host hits", "disk hits", f"written, {moved}", f"read, {moved}"):
        table.add_column(column, justify="right")
    for outcome, _ in comparisons:
        assert outcome.disk is not None
        disk, whole = outcome.disk, max(1, outcome.references)
        amounts = [
            f"{count:,}" if block_bytes is None else f"{count * block_bytes / 1e9:,.1f}"
            for count in (disk.written, disk.read)
        ]
        table.add_row(
            f"{outcome.capacity:,}",
            f"{disk.capacity:,}",
            f"{100 * outcome.host_hits / whole:.1f}",
            f"{100 * disk.hits / whole:.1f}",
            *amounts,
        )
    return table


def show(
    console: Console,
    trace: Trace,
    comparisons: list[Comparison],
    block_bytes: int | None,
    policy: str = LRU,
) -> None:
    """Print the tables.

    Parameters
    ----------
    console : Console
        Where to.
    trace : Trace
        What was replayed.
    comparisons : list of Comparison
        A row each.
    block_bytes : int or None
        Size of a block over all ranks, for the column in GB; None leaves it out.
    policy : str
        How the host tier evicted.
    """
    console.print(
        f"{trace.name}: {len(trace.requests):,} requests, {trace.references:,} block references, "
        f"{trace.distinct:,} distinct blocks"
    )
    rates = Table(title="hit rate (% of the references)")
    others = list(comparisons[0].others)
    kvbm = "kvbm" if policy == LRU else f"kvbm, {policy.rpartition(':')[2]}"
    size = [] if block_bytes is None else ["GB"]
    for column in ("blocks", *size, kvbm, *others, "evicted", "not stored", "references/s"):
        rates.add_column(column, justify="right")
    for outcome, hits in comparisons:
        gigabytes = [] if block_bytes is None else [f"{outcome.capacity * block_bytes / 1e9:,.1f}"]
        rates.add_row(
            f"{outcome.capacity:,}",
            *gigabytes,
            f"{100 * outcome.hit_rate:.1f}",
            *(f"{100 * hits[name] / outcome.references:.1f}" for name in others),
            f"{outcome.evicted:,}",
            f"{outcome.skipped:,}",
            f"{outcome.references_s:,.0f}",
        )
    console.print(rates)
    if comparisons[0].outcome.disk is not None:
        console.print(_tiers(comparisons, block_bytes))
    calls = Table(title="microseconds a call")
    for column in ("blocks", "call", *(f"P{p:g}" for p in PERCENTILES)):
        calls.add_column(column, justify="right")
    for outcome, _ in comparisons:
        for call, values in latencies(outcome).items():
            calls.add_row(f"{outcome.capacity:,}", call, *(f"{value:,.1f}" for value in values))
    console.print(calls)
