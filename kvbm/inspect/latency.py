# SPDX-License-Identifier: Apache-2.0
"""What transfers took, from the workers' histograms: numbers and quantiles by kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm._fast import contract

QUANTILES = (0.5, 0.99)


def quantile(buckets: npt.NDArray[np.uint64], share: float) -> float | None:
    """Seconds that a share of the times do not exceed; None if there are no times.

    Between the bounds of a bucket by proportion, as Prometheus does; what is beyond all bounds
    counts as the last of them.
    """
    counts = buckets.astype(np.float64)
    total = float(counts.sum())
    if total == 0:
        return None
    below = np.cumsum(counts)
    place = int(np.searchsorted(below, share * total))
    bounds = contract.LATENCY_BOUNDS_NS
    if place >= len(bounds):
        return bounds[-1] / 1e9
    lower = bounds[place - 1] if place else 0
    part = (share * total - (below[place] - counts[place])) / counts[place]
    return float(lower + (bounds[place] - lower) * part) / 1e9


def latency_rows(histograms: Any) -> list[dict[str, Any]]:
    """One row a kind of transfer of which some were done, over all workers.

    Parameters
    ----------
    histograms : array
        Of the records, as many as there are whole workers of; any shape, in the segment's order.
    """
    kinds, latencies = contract.OPERATION_KINDS, contract.LATENCIES
    size = len(kinds) * len(latencies)
    flat = histograms.reshape(-1)
    each = flat[: len(flat) // size * size].reshape(-1, len(kinds), len(latencies))
    with np.errstate(over="ignore"):  # only a damaged segment has so many
        buckets = each["bucket"].sum(axis=0, dtype=np.uint64)
    rows = []
    for place, kind in enumerate(kinds.values()):
        count = int(buckets[place, 0].sum())
        if count == 0:
            continue
        row: dict[str, Any] = {"kind": kind, "count": count}
        for number, latency in latencies.items():
            for share in QUANTILES:
                name = f"{latency}_p{round(100 * share)}_seconds"
                row[name] = quantile(buckets[place, number], share)
        rows.append(row)
    return rows
