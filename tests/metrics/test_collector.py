# SPDX-License-Identifier: Apache-2.0
"""What a scrape shows is what the segment has; nothing of it is attached or left open."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from kvbm._fast.keys import Keys
from kvbm._fast.objects import SHARED_MEMORY, object_path
from kvbm._fast.segment import shape_for
from kvbm.inspect.live import LiveSegment, Sweep
from kvbm.metrics.collector import InstanceCollector
from kvbm.metrics.names import GAUGES, HIT_RATES, SHOWN, UPSTREAM, shown
from tests.fast.instances import Instance, cache, digests, unique_name
from tests.inspect.samples import Sample
from tests.metrics.scrape import Samples, value
from tests.small_engine import SmallEngine


def samples_of(collector: InstanceCollector) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in collector.collect()
        for sample in family.samples
    }


@pytest.fixture
def collector(sample: Sample) -> Iterator[InstanceCollector]:
    one = InstanceCollector(lambda: [sample.name], lambda: (0.5, 0.25))
    yield one
    one.close()


def test_the_gauges_are_those_of_the_segment(sample: Sample, collector: InstanceCollector) -> None:
    found = samples_of(collector)
    assert value(found, "kvbm_up", instance=sample.name) == 1
    assert value(found, "kvbm_slots", tier="host", state="used") == 23
    assert value(found, "kvbm_slots", tier="host", state="free") == 41
    states = {"reset": 41, "partial": 3, "registered": 20, "evicting": 0}
    assert {s: value(found, "kvbm_blocks", state=s) for s in states} == states
    assert value(found, "kvbm_blocks_held") == 1
    assert value(found, "kvbm_pinned_blocks", leader="0", engine=f"{0xE1:016x}") == 4
    assert value(found, "kvbm_operations", kind="store", state="submitted") == 1
    assert value(found, "kvbm_queued_operations", rank="1") == 1
    assert value(found, "kvbm_participants", role="worker", state="alive") == 2
    assert value(found, "kvbm_participants", role="leader", state="dead") == 0
    assert value(found, "kvbm_ready_slots", rank="0") == 64
    assert value(found, "kvbm_recovering") == 0
    assert value(found, "kvbm_oldest_operation_seconds") > 0


def test_counters_are_those_of_their_lines_and_upstreams_are_the_sums(
    engine: SmallEngine,
) -> None:
    engine.store("first", range(6))
    engine.load("second", range(10, 16))
    engine.run_until(lambda: "second" in engine.received)
    engine.leader.finish("second", 6)
    collector = InstanceCollector(lambda: [engine.instance])
    try:
        found = samples_of(collector)
    finally:
        collector.close()
    counters = engine.segment.counters()
    assert counters["blocks_stored"] == counters["blocks_loaded"] == 6
    assert value(found, "kvbm_offload_blocks_d2h") == 6
    assert value(found, "kvbm_onboard_blocks_h2d") == 6
    assert value(found, "kvbm_matched_tokens") == 6 * 16
    stored = {"rank": "0", "source": "device", "target": "host"}
    assert value(found, "kvbm_transferred_bytes_total", **stored) == counters["bytes_stored"]
    seconds = value(found, "kvbm_transfer_seconds_total", **stored)
    assert seconds == pytest.approx(counters["store_ns"] / 1e9)
    for counter in SHOWN:
        metric = shown(counter)
        same = [
            number
            for (name, labels), number in found.items()
            if name == f"{metric.metric}_total" and metric.labels.items() <= dict(labels).items()
        ]
        assert sum(same) == pytest.approx(counters[counter] * metric.factor), counter


def test_the_disk_tier_is_shown_from_its_own_segment() -> None:
    host, disk = unique_name(), ""
    disk = f"{host}.disk"
    made = [
        Instance(shape_for(8, 24, 1, 16, True), host),
        Instance(shape_for(24, 0, 1, 16, True), disk),
    ]
    collector = InstanceCollector(lambda: [host.removeprefix("/kvbm-")])
    try:
        table = made[1].leader(engine_key=0xE3)
        cache(table, Keys(digests(5)))
        for name, count in (("stores", 2), ("blocks_stored", 7), ("bytes_loaded", 9)):
            table.count(name, count)
        made[0].leader().count("blocks_stored", 1)
        found = samples_of(collector)
    finally:
        collector.close()
        for one in made:
            one.remove()
    line = {"instance": host.removeprefix("/kvbm-"), "tier": "disk", "engine": f"{0xE3:016x}"}
    spilled, fetched = ({"source": s, "target": t} for s, t in (("host", "disk"), ("disk", "host")))
    assert value(found, "kvbm_transfers_total", result="done", **line, **spilled) == 2
    assert value(found, "kvbm_transferred_blocks_total", **line, **spilled) == 7
    assert value(found, "kvbm_transferred_bytes_total", **line, **fetched) == 9
    assert value(found, "kvbm_blocks_published_total", **line) == 5
    assert value(found, "kvbm_slots", tier="disk", state="used") == 5
    assert value(found, "kvbm_slots", tier="disk", state="free") == 19
    assert value(found, "kvbm_slots", tier="host", state="free") == 8
    assert value(found, "kvbm_offload_blocks_h2d") == 7
    assert value(found, "kvbm_offload_blocks_d2h") == 1


def test_each_metric_has_the_type_and_the_name_that_it_says(collector: InstanceCollector) -> None:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    text = generate_latest(registry).decode()
    for name in UPSTREAM:
        assert f"# TYPE {name} untyped\n{name} " in text, name
    for name in (*GAUGES, *HIT_RATES):
        assert f"# TYPE {name} gauge\n" in text, name
    for counter in SHOWN:
        assert f"# TYPE {shown(counter).metric}_total counter\n" in text, counter
    assert "kvbm_host_cache_hit_rate 0.5\n" in text
    assert "kvbm_disk_cache_hit_rate 0.25\n" in text
    assert "kvbm_object_cache_hit_rate 0.0\n" in text


def test_counters_go_on_where_an_engine_ends(sample: Sample) -> None:
    collector = InstanceCollector(lambda: [sample.name])
    try:
        before = samples_of(collector)
        for handle in sample.handles:
            sample.table.cancel(handle)
            sample.table.collect(handle)
        sample.table.unpin(sample.held)
        for segment in sample.instance.attached[1:]:
            segment.close()
        table = sample.instance.leader(engine_key=0xE2)
        cache(table, Keys(digests(2, "after")))
        after = samples_of(collector)
    finally:
        collector.close()
    published = "kvbm_blocks_published_total"
    assert value(before, published, engine=f"{0xE1:016x}", rank="") == 20
    assert value(after, published, engine=f"{0xE2:016x}", rank="") == 22


def test_a_scrape_holds_nothing(sample: Sample, collector: InstanceCollector) -> None:
    samples_of(collector)
    for segment in sample.instance.attached[1:]:
        segment.close()
    assert not sample.instance.creator.has_other_users()


def test_an_instance_that_is_gone_is_down_and_one_that_comes_back_is_up() -> None:
    name = unique_name()
    short = name.removeprefix("/kvbm-")
    path = SHARED_MEMORY / name.lstrip("/")
    collector = InstanceCollector(lambda: [short])
    try:
        assert value(samples_of(collector), "kvbm_up") == 0
        for slots in (8, 16):  # an engine, and the next one with another cache
            one = Instance(shape_for(slots, 0, 1, 16, True), name)
            try:
                found = samples_of(collector)
                assert value(found, "kvbm_up") == 1
                assert value(found, "kvbm_slots", state="free") == slots
            finally:
                one.remove()
        path.write_bytes(os.urandom(9000))
        assert value(samples_of(collector), "kvbm_up") == 0
    finally:
        collector.close()
        path.unlink(missing_ok=True)


def test_a_segment_that_is_cut_off_is_down_and_fails_no_scrape(
    sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = object_path(unique_name())
    path.write_bytes(object_path(sample.instance.name).read_bytes())
    name = path.name.removeprefix("kvbm-")
    collector = InstanceCollector(lambda: [name, sample.name])
    sweep = LiveSegment.sweep_all

    def cut_off(live: LiveSegment) -> Sweep:
        if live.instance == name:
            os.truncate(path, 0)
        return sweep(live)

    try:
        assert value(samples_of(collector), "kvbm_up", instance=name) == 1
        monkeypatch.setattr(LiveSegment, "sweep_all", cut_off)
        ups = [value(samples_of(collector), "kvbm_up", instance=name) for _ in range(2)]
        assert ups == [1, 0]
        assert value(samples_of(collector), "kvbm_slots", tier="host", state="used") == 23
    finally:
        collector.close()
        path.unlink()
