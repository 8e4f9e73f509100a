# SPDX-License-Identifier: Apache-2.0
"""What a scrape shows of the workers' histograms is what they have counted, life after life."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvbm._fast.contract import LATENCY_BOUNDS_NS, OPERATION_KINDS
from kvbm._fast.timing import worker_latencies
from kvbm.inspect.live import LiveSegment
from kvbm.metrics.collector import InstanceCollector
from kvbm.metrics.latencies import BOUNDS, PATHS
from kvbm.metrics.names import HISTOGRAMS
from tests.disk_engine import disk_engines, spill
from tests.fast.instances import instance
from tests.fast.raw_segment import HISTOGRAM_BYTES
from tests.fast.raw_segment import HISTOGRAMS as EACH
from tests.metrics.scrape import Samples, value
from tests.metrics.test_collector import samples_of
from tests.small_engine import SmallEngine


@pytest.fixture
def make_engine(tmp_path: Path) -> Iterator[Callable[..., SmallEngine]]:
    """Make engines with a disk tier."""
    yield from disk_engines(tmp_path)


def scraped(name: str) -> Samples:
    """All samples of one instance."""
    collector = InstanceCollector(lambda: [name])
    try:
        return samples_of(collector)
    finally:
        collector.close()


def labels_of(kind: str) -> dict[str, str]:
    """Labels of the transfers of a kind."""
    return dict(zip(("tier", "source", "target"), PATHS[kind], strict=True))


def test_the_paths_are_those_of_all_kinds() -> None:
    assert list(PATHS) == list(OPERATION_KINDS.values())
    assert [float(bound) * 1e9 for bound in BOUNDS[:-1]] == pytest.approx(LATENCY_BOUNDS_NS)


def test_each_bucket_is_where_it_belongs_and_they_add_up(engine: SmallEngine) -> None:
    for number in range(5):
        engine.store(f"store {number}", range(6), number)
    engine.load("load", range(10, 16), 4)
    engine.run_until(lambda: "load" in engine.received)
    found = scraped(engine.instance)
    counters = engine.segment.counters()
    own = worker_latencies(engine.segment, 0, 0)
    for kind in ("store", "load"):
        labels, done = labels_of(kind), counters[f"{kind}s"]
        assert done > 0
        for name, (latency, _) in HISTOGRAMS.items():
            one = getattr(own[kind], latency)
            assert value(found, f"{name}_count", **labels) == sum(one.buckets) == done
            assert value(found, f"{name}_sum", **labels) == pytest.approx(one.sum_ns / 1e9)
            for place, bound in enumerate(BOUNDS):
                bucket = value(found, f"{name}_bucket", le=bound, **labels)
                assert bucket == sum(one.buckets[: place + 1])
    assert value(found, "kvbm_cpu_seconds_total", rank="0", tier="host") > 0


def test_copies_to_disk_are_in_the_histograms_of_their_worker(
    make_engine: Callable[..., SmallEngine],
) -> None:
    engine = make_engine()
    spill(engine)
    found = scraped(engine.instance)
    labels = labels_of("spill")
    done = value(found, "kvbm_transfers_total", result="done", rank="", **labels)
    assert value(found, "kvbm_transfer_latency_seconds_count", **labels) == done > 0


def test_a_worker_that_has_counted_nothing_has_no_histogram(engine: SmallEngine) -> None:
    assert not [name for name, _ in scraped(engine.instance) if name.startswith("kvbm_transfer_l")]


def test_histograms_of_all_workers_are_read_from_their_places() -> None:
    one = instance(host_slots=8, ranks=3)
    try:
        with one.writable() as raw:
            for place in range(16 * 3 * EACH):
                raw.put_u64(raw.at["histograms"] + place * HISTOGRAM_BYTES, place + 1)
        with LiveSegment(one.name.removeprefix("/kvbm-")) as live:
            found = live.histograms()["bucket"][..., 0]
        assert found.shape == (16, 3, 4, 2)
        assert found.ravel().tolist() == list(range(1, 16 * 3 * EACH + 1))
        for leader, rank in ((0, 0), (15, 2)):
            own = worker_latencies(one.creator, leader, rank)["fetch"].copy.buckets[0]
            assert own == found[leader, rank, 3, 1]
    finally:
        one.remove()
