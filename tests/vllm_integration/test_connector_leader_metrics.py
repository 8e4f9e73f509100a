# SPDX-License-Identifier: Apache-2.0
"""An engine's own metrics: what is scraped is what its requests did."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.leaks import wait_until
from tests.metrics.scrape import free_port, scrape, value

pytestmark = pytest.mark.slow  # importing vLLM takes many seconds

BLOCK = 16
PROMPT = list(range(3, 3 + 4 * BLOCK + 5))  # four blocks and a bit
BLOCKS = [1, 2, 3, 4, 5]
OTHERS = [11, 12, 13, 14, 15]


def test_a_scrape_shows_what_the_requests_did(connect: Any) -> None:
    port = free_port()
    engine = connect(metrics=True, metrics_port=port)
    first = engine.request("first", PROMPT)
    assert engine.matched(first) == 0
    engine.cache(first, BLOCKS, 10)
    assert wait_until(lambda: engine.step() or engine.side.segment.counters()["published"] == 4)
    second = engine.request("second", PROMPT)
    assert engine.load(second, OTHERS) == 4 * BLOCK
    for request, blocks in ((first, BLOCKS), (second, OTHERS)):
        engine.scheduler.request_finished(request, blocks)
    found = scrape(port)
    assert value(found, "kvbm_offload_blocks_d2h") == 4
    assert value(found, "kvbm_onboard_blocks_h2d") == 4
    assert value(found, "kvbm_matched_tokens") == 4 * BLOCK
    assert value(found, "kvbm_host_cache_hit_rate") == 0.5  # none of four, then four of four
    assert value(found, "kvbm_disk_cache_hit_rate") == 0.0
    cpu = [value(found, "kvbm_cpu_seconds_total", rank=rank, tier="host") for rank in ("", "0")]
    assert min(cpu) > 0  # of the scheduler's calls, of the copies
    assert sum(cpu) < time.process_time()


def test_blocks_that_a_look_up_brought_from_disk_are_hits_of_the_disk(connect: Any) -> None:
    port = free_port()
    engine = connect(metrics=True, metrics_port=port)
    engine.cache(engine.request("first", PROMPT), BLOCKS, 10)
    assert wait_until(lambda: engine.step() or engine.side.segment.counters()["published"] == 4)
    second = engine.request("second", PROMPT)
    assert engine.matched(second) == 4 * BLOCK
    engine.side.leader.sequences["second"].promoted_from = 1
    assert engine.load(second, OTHERS) == 4 * BLOCK
    engine.scheduler.request_finished(second, OTHERS)
    found = scrape(port)
    assert value(found, "kvbm_host_cache_hit_rate") == 0.25
    assert value(found, "kvbm_disk_cache_hit_rate") == 0.75


def test_without_the_setting_nothing_is_served(connect: Any) -> None:
    assert connect().side._exporter is None


def test_a_port_in_use_does_not_stop_the_second_engine(connect: Any) -> None:
    port = free_port()
    first = connect(metrics=True, metrics_port=port)
    second = connect(metrics=True, metrics_port=port)
    assert second.side._exporter is None
    assert second.matched(second.request("a", PROMPT)) == 0
    assert value(scrape(port), "kvbm_up", instance=first.side.instance) == 1
