# SPDX-License-Identifier: Apache-2.0
"""The workers' histograms of what transfers take, as Prometheus has them."""

from __future__ import annotations

import numpy as np
from prometheus_client.core import HistogramMetricFamily

from kvbm._fast import contract
from kvbm.inspect.live import LiveSegment
from kvbm.metrics.names import DEVICE, DISK, HISTOGRAM_LABELS, HISTOGRAMS, HOST

BOUNDS = (*(str(ns / 1e9) for ns in contract.LATENCY_BOUNDS_NS), "+Inf")
"""Upper bounds of the buckets, in seconds."""
PATHS = {
    "store": (HOST, DEVICE, HOST),
    "load": (HOST, HOST, DEVICE),
    "spill": (DISK, HOST, DISK),
    "fetch": (DISK, DISK, HOST),
}
"""Of each kind of operation: the tier whose transfer it is, where it reads and where it writes."""


def latency_families() -> dict[str, HistogramMetricFamily]:
    """Both metrics, with no worker in them yet, by the histogram that each shows."""
    return {
        latency: HistogramMetricFamily(name, meaning, labels=HISTOGRAM_LABELS)
        for name, (latency, meaning) in HISTOGRAMS.items()
    }


def add_latencies(
    families: dict[str, HistogramMetricFamily], live: LiveSegment, places: dict[int, list[str]]
) -> None:
    """Add the histograms of an instance's workers that have counted something.

    Parameters
    ----------
    families : dict
        As `latency_families` makes them.
    live : LiveSegment
        The host tier's segment, where the workers count copies to and from disk as well.
    places : dict
        Values of the labels of the lines that are shown.
    """
    found = live.histograms()
    for line, place in places.items():
        leader, rank = divmod(line - contract.LEADERS, contract.RANKS)
        if line < contract.LEADERS or rank >= live.shape.ranks:
            continue
        for kind, name in contract.OPERATION_KINDS.items():
            for number, latency in contract.LATENCIES.items():
                one = found[leader, rank, kind - 1, number]
                counts = np.cumsum(one["bucket"], dtype=np.float64).tolist()
                if counts[-1]:
                    families[latency].add_metric(
                        [*place, *PATHS[name]],
                        buckets=list(zip(BOUNDS, counts, strict=True)),
                        sum_value=int(one["sum_ns"]) / 1e9,
                    )
