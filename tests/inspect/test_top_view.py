# SPDX-License-Identifier: Apache-2.0
"""The lines of `top`."""

from __future__ import annotations

import re

from kvbm._fast.keys import Keys
from kvbm.inspect.frame import frame
from kvbm.inspect.live import MOVING, LiveSegment, Rates
from kvbm.inspect.top_view import gigabytes, screen
from tests.fast.instances import cache, digests
from tests.inspect.disk_samples import DiskSample
from tests.inspect.samples import Sample

LINES = """\
kvbm NAME  age AGE  (q ends, space stops the picture)

blocks   ███████████████████····················· NN.N % NN/64
host     ███████████████████····················· NN.N % NN/64
states   reset 34 partial 3 registered 27 evicting 0 held 1

1 s 10 s 60 s
hit rate of blocks - - -
look-ups a second 0.0 0.0 0.0
blocks stored a second 0.0 0.0 0.0
blocks loaded a second 0.0 0.0 0.0
blocks evicted a second 0.0 0.0 0.0
to make room 0.0 0.0 0.0
stores skipped a second 0.0 0.0 0.0
CPU of leaders' calls 0.0 % 0.0 % 0.0 %
CPU of copies 0.0 % 0.0 % 0.0 %

stored 0.00 MB/s 0.00 MB/s 0.00 MB/s
loaded 0.00 MB/s 0.00 MB/s 0.00 MB/s
operations in flight: 1
store submitted 3 blocks leader 0 AGE

participant pid alive pins queued
leader 0 PID yes 4
worker 0.0 PID yes 1
worker 0.1 PID yes 1

prefixes that most others begin with
d863fc5301d33d68 6 blocks long, 2 continuations
prefixes at which most matches ended
0e93688955c8f6b3 5 blocks long, 1 matches"""


def test_the_screen_shows_everything_once(sample: Sample) -> None:
    cache(sample.table, Keys(digests(7, "more")))
    with LiveSegment(sample.name) as live:
        live.sweep()
        found = screen(frame(live, Rates()))
    pid = live.instance.split("-")[1]
    text = "\n".join(re.sub(r" +", " ", line).strip() for line in found)
    text = text.replace(f"kvbm {sample.name}", "kvbm NAME").replace(f" {pid} ", " PID ")
    text = re.sub(r"\d+ (ms|s|min)(?=  ?\(q|$| \(q)", "AGE", text, flags=re.MULTILINE)
    wanted = re.sub(r" +", " ", LINES).replace("NN.N % NN/64", "46.9 % 30/64")
    text = text.replace("1 s 10 s AGE", "1 s 10 s 60 s")
    assert text == wanted


def test_the_rates_are_those_of_the_counters(sample: Sample) -> None:
    rates = Rates(every=0)
    with LiveSegment(sample.name) as live:
        rates.add(100.0, live.counters())
        keys = Keys(digests(5, "held"))
        for _ in range(30):
            _, ref = sample.table.match(keys, 0, 5)
            assert ref is not None
            sample.table.unpin(ref)
        rates.add(110.0, live.counters())
        text = "\n".join(screen(frame(live, rates)))
    assert re.search(r"hit rate of blocks +100.0 % +100.0 % +100.0 %", text)
    assert re.search(r"look-ups a second +3.0 +3.0 +3.0", text)


def test_rates_of_bytes_have_a_unit_that_fits() -> None:
    assert gigabytes(2.5e9) == "2.50 GB/s"
    assert gigabytes(1.5e6) == "1.50 MB/s"


def test_the_disk_tier_has_lines_of_its_own(disk: DiskSample) -> None:
    rates = Rates(every=0)
    zero = dict.fromkeys(MOVING, 0)
    rates.add(100.0, zero)
    rates.add(110.0, zero | {"bytes_stored": 50_000_000_000, "bytes_loaded": 20_000_000})
    with LiveSegment(disk.name) as live, LiveSegment(f"{disk.name}.disk") as tier:
        tier.sweep_all()
        text = "\n".join(screen(frame(live, Rates(), (tier, rates))))
    assert re.search(r"disk .* 56.2 %  18/32", text)
    assert "on disk  reset 14  partial 2  registered 16" in text
    assert re.search(r"written to disk +5.00 GB/s +5.00 GB/s", text)
    assert re.search(r"read from disk +2.00 MB/s", text)
