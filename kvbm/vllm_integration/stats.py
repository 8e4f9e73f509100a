# SPDX-License-Identifier: Apache-2.0
"""kvbm's counters in vLLM's own statistics: its log line and its `/metrics`.

The counters are in the segment, on a line for each process that is attached, so the scheduler side
can read its own and those of all ranks. Other engines that share the instance count on other lines,
and report for themselves. What it gives to vLLM is how far they moved since its last report, for
the log line that `reduce` makes every ten seconds, and how far since its start, for Prometheus:
vLLM before 0.28 drops the statistics of steps without output (those in which a load is all that
happens), and the next report makes up for that. The first three names of metrics are those of
Dynamo's KVBM.
"""

import time
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from kvbm._fast.participants import engine_counters
from kvbm._fast.segment import Segment
from kvbm.guard import guarded

if TYPE_CHECKING:
    from vllm.config import VllmConfig

REPORT_SECS = 0.1
"""Least time between two reports of a busy engine."""

METRICS: dict[str, tuple[str, float, str]] = {
    "kvbm_matched_tokens": ("matched_tokens", 1.0, "Tokens found in the cache and loaded."),
    "kvbm_offload_blocks_d2h": ("blocks_stored", 1.0, "Blocks copied from device to host."),
    "kvbm_onboard_blocks_h2d": ("blocks_loaded", 1.0, "Blocks copied from host to device."),
    "kvbm_lookup_blocks": ("lookup_blocks", 1.0, "Blocks looked up beyond the device's prefix."),
    "kvbm_matched_blocks": ("matched_blocks", 1.0, "Blocks of these that were found."),
    "kvbm_evicted_blocks": ("evicted", 1.0, "Blocks evicted from the cache."),
    "kvbm_deduplicated_blocks": ("deduplicated", 1.0, "Blocks not stored: they were there."),
    "kvbm_offload_bytes": ("bytes_stored", 1.0, "Bytes copied from device to host."),
    "kvbm_onboard_bytes": ("bytes_loaded", 1.0, "Bytes copied from host to device."),
    "kvbm_offload_seconds": ("store_ns", 1e-9, "Time spent copying from device to host."),
    "kvbm_onboard_seconds": ("load_ns", 1e-9, "Time spent copying from host to device."),
    "kvbm_offload_failures": ("stores_failed", 1.0, "Transfers to the host that failed."),
    "kvbm_onboard_failures": ("loads_failed", 1.0, "Transfers to the device that failed."),
    "kvbm_offload_cancelled": (
        "stores_cancelled",
        1.0,
        "Transfers to the host that were stopped: preemptions, resets.",
    ),
    "kvbm_onboard_cancelled": (
        "loads_cancelled",
        1.0,
        "Transfers to the device that were stopped: aborted requests.",
    ),
    "kvbm_skipped_no_slot": ("skipped_no_slot", 1.0, "Blocks not stored: nothing to evict."),
    "kvbm_skipped_no_operation": (
        "skipped_no_operation",
        1.0,
        "Transfers not begun: too many in flight.",
    ),
    "kvbm_errors": ("errors", 1.0, "Surprises that cost a request its cache."),
}
"""Metric: counter of the segment, factor, meaning."""


WORKER_ERRORS = "worker_errors"
SHOWN_IF_ANY = (
    "stores_failed",
    "loads_failed",
    "stores_cancelled",
    "loads_cancelled",
    "errors",
    WORKER_ERRORS,
)
MOVED, TOTAL = "moved", "total"


class KvbmStats(KVConnectorStats):
    """How far the counters moved.

    `data` has two dicts of counter names to numbers: `moved` since the last report, `total` since
    the start of the engine.
    """

    def reset(self) -> None:
        """Begin at zero."""
        self.data: dict[str, dict[str, int]] = {}

    @classmethod
    def of(cls, moved: dict[str, int], total: dict[str, int]) -> "KvbmStats":
        """Statistics with these numbers."""
        return cls(data={MOVED: moved, TOTAL: total})

    def __getitem__(self, name: str) -> Any:
        """Return `data` for "data": a MultiConnector before 0.30 takes all statistics for messages.

        They are these objects if engine and front end are one process.
        """
        if name != "data":
            raise KeyError(name)
        return self.data

    @guarded(lambda: True)
    def is_empty(self) -> bool:
        """Return whether there is nothing to report."""
        return not any(any(numbers.values()) for numbers in self.data.values())

    def aggregate(self, other: KVConnectorStats) -> "KvbmStats":
        """Add what another process or a later moment reported."""
        self._add(other)
        return self

    @guarded(lambda: None)
    def _add(self, other: KVConnectorStats) -> None:
        moved = self.data.setdefault(MOVED, {})
        for name, value in other.data.get(MOVED, {}).items():
            moved[name] = moved.get(name, 0) + value
        total = self.data.setdefault(TOTAL, {})
        for name, value in other.data.get(TOTAL, {}).items():
            total[name] = max(total.get(name, 0), value)

    @guarded(dict)
    def reduce(self) -> dict[str, int | float]:
        """What the log line shows: blocks, hit rate, throughput of copies."""
        data = self.data.get(MOVED, {})
        shown: dict[str, int | float] = {
            "blocks stored": data.get("blocks_stored", 0),
            "blocks loaded": data.get("blocks_loaded", 0),
            "blocks evicted": data.get("evicted", 0),
        }
        if data.get("lookup_blocks"):
            rate = data.get("matched_blocks", 0) / data["lookup_blocks"]
            shown["hit rate of look-ups"] = round(rate, 3)
        for what, bytes_name, ns_name in (
            ("stored GB/s", "bytes_stored", "store_ns"),
            ("loaded GB/s", "bytes_loaded", "load_ns"),
        ):
            if data.get(ns_name):
                shown[what] = round(data.get(bytes_name, 0) / data[ns_name], 2)
        for name in SHOWN_IF_ANY:
            if data.get(name):
                shown[name.replace("_", " ")] = data[name]
        return shown


class StatsReader:
    """Reads an engine's counters as differences.

    Parameters
    ----------
    segment : Segment
        Attached, with the engine's leader line, just claimed.
    repeat : bool
        Reports may get lost: say the totals again although nothing moved since.
    """

    def __init__(self, segment: Segment, repeat: bool = False) -> None:
        self._segment = segment
        self._repeat = repeat
        self._names = sorted({counter for counter, _, _ in METRICS.values()})
        self._first = self._last = self._counters()
        self._at = 0.0

    def _counters(self) -> dict[str, int]:
        counters = engine_counters(self._segment)
        return {name: counters[name] for name in self._names}

    def read(self, at_once: bool) -> KvbmStats | None:
        """What moved since the last report; None if nothing did, or that was just now.

        Parameters
        ----------
        at_once : bool
            Report however short ago the last one was: no step may follow soon.
        """
        now = time.monotonic()
        if not at_once and now - self._at < REPORT_SECS:
            return None
        counters = self._counters()
        moved = {name: counters[name] - self._last[name] for name in self._names}
        moved = {name: value for name, value in moved.items() if value > 0}
        if not moved and not self._repeat:
            return None
        self._at, self._last = now, counters
        stats = KvbmStats.of(
            moved, {name: counters[name] - self._first[name] for name in self._names}
        )
        return None if stats.is_empty() else stats


class KvbmPromMetrics(KVConnectorPromMetrics):
    """Counters `kvbm_*` in vLLM's Prometheus registry, labelled as vLLM's own.

    Parameters
    ----------
    vllm_config : VllmConfig
        Configuration of the engine.
    metric_types : dict
        Classes to use for counters and so on.
    labelnames : list of str
        Labels of vLLM's metrics.
    per_engine_labelvalues : dict of int to list
        Their values, by engine.
    """

    def __init__(
        self,
        vllm_config: "VllmConfig",
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        counter = metric_types[Counter]
        self._seen: dict[tuple[str, int], int] = {}
        self._counters: dict[str, dict[int, Any]] = {}
        for name, (_, _, meaning) in METRICS.items():
            metric = counter(name=name, documentation=meaning, labelnames=labelnames)
            self._counters[name] = {
                engine: metric.labels(*values) for engine, values in per_engine_labelvalues.items()
            }

    @guarded(lambda: None)
    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Count what a `KvbmStats.data` says beyond what was counted before."""
        for source, value in transfer_stats_data.get(TOTAL, {}).items():
            name, factor = self._metric_of(source)
            new = value - self._seen.get((source, engine_idx), 0)
            if name is not None and new > 0:
                self._seen[source, engine_idx] = value
                self._counters[name][engine_idx].inc(new * factor)

    @staticmethod
    def _metric_of(source: str) -> tuple[str | None, float]:
        """Metric that a counter goes into, and the factor."""
        if source.startswith(WORKER_ERRORS):  # of one rank each
            return "kvbm_errors", 1.0
        for name, (counter, factor, _) in METRICS.items():
            if counter == source:
                return name, factor
        return None, 0.0
