# SPDX-License-Identifier: Apache-2.0
"""The device under the disk tier in the metrics: what is known, and not read at each scrape."""

from __future__ import annotations

from pathlib import Path

from prometheus_client.core import GaugeMetricFamily

from kvbm.metrics.collector import InstanceCollector
from kvbm.metrics.device import AGAIN_SECS, DeviceReader
from kvbm.metrics.names import GAUGES
from kvbm.tiers.disk_device import DiskDevice
from tests.inspect.disk_samples import disk_sample
from tests.inspect.samples import Sample

NVME = DiskDevice("nvme0n1", "A Drive", False, 4096, 0.07, 0.98, 512_000, 0)


def filled(reader: DeviceReader) -> dict[str, float]:
    gauges = {
        name: GaugeMetricFamily(name, meaning, labels=labels)
        for name, (meaning, labels) in GAUGES.items()
    }
    reader.fill(gauges, "chat")
    return {
        sample.name: sample.value
        for gauge in gauges.values()
        for sample in gauge.samples
        if sample.labels == {"instance": "chat", "device": "nvme0n1"}
    }


def test_all_that_is_known_is_shown() -> None:
    assert filled(DeviceReader(Path("/somewhere"), lambda _: NVME)) == {
        "kvbm_disk_device_written_bytes": 4096,
        "kvbm_disk_device_lifetime_written_bytes": 512_000,
        "kvbm_disk_device_wear_ratio": 0.07,
        "kvbm_disk_device_spare_ratio": 0.98,
    }


def test_what_is_not_known_has_no_sample() -> None:
    unknown = DiskDevice("nvme0n1", written_bytes=4096, problem="no right")
    found = filled(DeviceReader(Path("/somewhere"), lambda _: unknown))
    assert found == {"kvbm_disk_device_written_bytes": 4096}


def test_a_drive_is_asked_once_a_minute() -> None:
    asked: list[Path] = []
    now = [1000.0]

    def look(folder: Path) -> DiskDevice:
        asked.append(folder)
        return NVME

    reader = DeviceReader(Path("/somewhere"), look, lambda: now[0])
    for _ in range(3):
        filled(reader)
    now[0] += AGAIN_SECS
    filled(reader)
    assert asked == [Path("/somewhere")] * 2


def test_an_instance_has_a_device_where_it_has_a_disk_tier(tmp_path: Path) -> None:
    with disk_sample(tmp_path) as disk:
        collector = InstanceCollector(lambda: [disk.name], None, DeviceReader(None, lambda _: NVME))
        names = {sample.name for family in collector.collect() for sample in family.samples}
        collector.close()
    assert "kvbm_disk_device_wear_ratio" in names


def test_an_instance_without_a_disk_tier_has_none(sample: Sample) -> None:
    collector = InstanceCollector(lambda: [sample.name], device=DeviceReader(None, lambda _: NVME))
    names = {sample.name for family in collector.collect() for sample in family.samples}
    collector.close()
    assert "kvbm_slots" in names
    assert "kvbm_disk_device_wear_ratio" not in names
