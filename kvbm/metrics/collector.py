# SPDX-License-Identifier: Apache-2.0
"""Reads an instance's segment at each scrape; holds no line and no lock in it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
    UnknownMetricFamily,
)
from prometheus_client.registry import Collector

from kvbm._fast import contract
from kvbm._fast.segment import COUNTER_NAMES
from kvbm.errors import InspectError
from kvbm.inspect.follow import Follower
from kvbm.inspect.live import LiveSegment
from kvbm.instance import disk_instance
from kvbm.metrics.device import DeviceReader
from kvbm.metrics.latencies import add_latencies, latency_families
from kvbm.metrics.names import (
    DISK,
    GAUGES,
    HIT_RATES,
    HOST,
    SHOWN,
    UPSTREAM,
    label_names,
    shown,
)

HitRates = Callable[[], tuple[float, float]]
Gauges = dict[str, GaugeMetricFamily]


class InstanceCollector(Collector):
    """Metrics of some instances, read when they are asked for.

    Parameters
    ----------
    instances : callable
        Names of the instances to show.
    hit_rates : callable, optional
        Hit rates of host and disk over the last requests, 0 to 1; only the engine knows them.
    device : DeviceReader, optional
        Reads the device under the disk tiers.
    """

    def __init__(
        self,
        instances: Callable[[], Iterable[str]],
        hit_rates: HitRates | None = None,
        device: DeviceReader | None = None,
    ) -> None:
        self._instances = instances
        self._hit_rates = hit_rates
        self._device = device or DeviceReader()
        self._lock = threading.Lock()
        self._follower = Follower()

    def describe(self) -> Iterable[Metric]:
        """Nothing: a registry does not read the segment when the collector is registered."""
        return []

    def collect(self) -> Iterable[Metric]:
        """All metrics of this moment."""
        with self._lock:
            return list(self._collect())

    def close(self) -> None:
        """Close everything; a later `collect` opens it again."""
        with self._lock:
            self._follower.close()

    def _collect(self) -> Iterator[Metric]:
        gauges = {
            name: GaugeMetricFamily(name, meaning, labels=labels)
            for name, (meaning, labels) in GAUGES.items()
        }
        lines, latencies = Lines(), latency_families()
        names = list(self._instances())
        self._follower.keep(names)
        for name in names:
            live = self._follower.find(name)
            gauges["kvbm_up"].add_metric([name], float(live is not None))
            if live is None:
                continue
            with contextlib.suppress(InspectError):  # cut off at this moment: what was read stands
                add_latencies(latencies, live, lines.add(live, name, HOST))
                fill_gauges(live, gauges)
                disk = self._follower.find(disk_instance(name)) if live.shape.disk_slots else None
                if disk is not None:
                    lines.add(disk, name, DISK)
                    fill_slots(disk, gauges, name, DISK)
                    self._device.fill(gauges, name)
        yield from lines.upstream()
        yield from lines.families()
        yield from latencies.values()
        yield from gauges.values()
        if self._hit_rates is not None:
            rates = (*self._hit_rates(), 0.0)
            for (name, meaning), rate in zip(HIT_RATES.items(), rates, strict=True):
                yield GaugeMetricFamily(name, meaning, value=rate)


def engine_of(live: LiveSegment, line: int) -> str:
    """Key of the engine that a line belongs to now; empty for one that nobody uses."""
    record = live.participants[line]
    return f"{int(record['engine_key']):016x}" if record["role"] else ""


def place_of(live: LiveSegment, line: int, instance: str | None = None) -> list[str]:
    """Values of the labels of a line: instance, engine, leader, rank (empty for a leader)."""
    instance = live.instance if instance is None else instance
    if line < contract.LEADERS:
        return [instance, engine_of(live, line), str(line), ""]
    leader, rank = divmod(line - contract.LEADERS, contract.RANKS)
    return [instance, engine_of(live, line), str(leader), str(rank)]


class Lines:
    """Counters of all lines, as metrics."""

    def __init__(self) -> None:
        self._families: dict[str, CounterMetricFamily] = {}
        self._totals: Counter[tuple[str, str]] = Counter()
        for counter in SHOWN:
            metric = shown(counter)
            if metric.metric not in self._families:
                self._families[metric.metric] = CounterMetricFamily(
                    metric.metric, metric.meaning, labels=label_names(metric.metric)
                )

    def add(self, live: LiveSegment, instance: str, tier: str) -> dict[int, list[str]]:
        """Add the lines of a tier's segment that are used, or that have counted something.

        Returns
        -------
        dict
            Of each of these lines: values of the labels instance, engine, leader, rank.
        """
        values = live.line_counters()
        used = set(live.lines())
        places = {}
        for line in range(len(values)):
            if line not in used and not values[line].any():
                continue
            places[line] = place_of(live, line, instance)
            place = [*places[line], tier]
            counts = dict(zip(COUNTER_NAMES, values[line].tolist(), strict=False))
            for counter in SHOWN:
                metric, value = shown(counter, tier), counts[counter]
                self._totals[tier, counter] += value
                family = self._families[metric.metric]
                family.add_metric([*place, *metric.labels.values()], value * metric.factor)
        return places

    def families(self) -> Iterator[Metric]:
        """Our own counters, with labels."""
        yield from self._families.values()

    def upstream(self) -> Iterator[Metric]:
        """Upstream's counters, without labels, over all that is shown."""
        for name, (counter, meaning) in UPSTREAM.items():
            value = 0 if counter is None else self._totals[counter]
            yield UnknownMetricFamily(name, meaning, value=float(value))


def fill_gauges(live: LiveSegment, gauges: Gauges) -> None:
    """Add what an instance has at this moment."""
    name = live.instance
    fill_slots(live, gauges, name, HOST)
    for rank in range(live.shape.ranks):
        ready = int(live.header["ready_slots"][rank])
        gauges["kvbm_ready_slots"].add_metric([name, str(rank)], ready)
    swept = live.sweep_all()
    for number, state in contract.BLOCK_STATES.items():
        gauges["kvbm_blocks"].add_metric([name, state], swept.states[number])
    gauges["kvbm_blocks_held"].add_metric([name], swept.held)
    gauges["kvbm_recovering"].add_metric([name], int(bool(live.header["recovering"])))
    _fill_participants(live, gauges, swept.pins)
    _fill_operations(live, gauges)


def fill_slots(live: LiveSegment, gauges: Gauges, instance: str, tier: str) -> None:
    """Add the slots of a tier; those of each are the host slots of its own segment."""
    used, total = live.pools().get("host", (0, 0))
    gauges["kvbm_slots"].add_metric([instance, tier, "used"], used)
    gauges["kvbm_slots"].add_metric([instance, tier, "free"], total - used)


def _fill_participants(live: LiveSegment, gauges: Gauges, pins: list[int]) -> None:
    locked = live.locks().locked or frozenset()
    counts: Counter[tuple[str, str]] = Counter()
    for line in live.lines():
        place = place_of(live, line)
        role = "leader" if line < contract.LEADERS else "worker"
        counts[role, "alive" if line in locked else "dead"] += 1
        if role == "leader":
            gauges["kvbm_pinned_blocks"].add_metric(place[:3], pins[line])
            continue
        leader, rank = int(place[2]), int(place[3])
        if rank < live.shape.ranks:
            queued = live.queued(leader, rank)
            gauges["kvbm_queued_operations"].add_metric(place, queued)
    for role in ("leader", "worker"):
        for state in ("alive", "dead"):
            gauges["kvbm_participants"].add_metric(
                [live.instance, role, state], counts[role, state]
            )


def _fill_operations(live: LiveSegment, gauges: Gauges) -> None:
    found = live.in_flight()
    kinds, states = contract.OPERATION_KINDS, contract.OPERATION_STATES
    counts = Counter((leader, kind, state) for leader, kind, state, _, _ in found)
    for (leader, kind, state), count in sorted(counts.items()):
        labels = [live.instance, engine_of(live, leader), str(leader)]
        labels += [kinds.get(kind, str(kind)), states.get(state, str(state))]
        gauges["kvbm_operations"].add_metric(labels, count)
    oldest = min((submitted for *_, submitted in found), default=0)
    age = max(0, time.monotonic_ns() - oldest) / 1e9 if found else 0.0
    gauges["kvbm_oldest_operation_seconds"].add_metric([live.instance], age)
