# SPDX-License-Identifier: Apache-2.0
"""What an engine reports is its own doing."""

from __future__ import annotations

import os
from typing import Any

import pytest

from kvbm.instance import remove
from tests.leaks import wait_until

pytestmark = pytest.mark.slow  # importing vLLM takes many seconds

BLOCK = 16
PROMPT = list(range(3, 3 + 4 * BLOCK + 5))  # four blocks and a bit
OTHER = list(range(500, 500 + 2 * BLOCK + 5))
BLOCKS = [1, 2, 3, 4, 5]
OTHERS = [11, 12, 13, 14, 15]


def totals(engine: Any) -> dict[str, int]:
    """What an engine has reported about itself since its start; 0 where it says nothing."""
    engine.side._stats._at = 0.0
    stats = engine.scheduler.get_kv_connector_stats()
    found = {} if stats is None else stats.data["total"]
    return {name: found.get(name, 0) for name in engine.side._stats._names}


def test_engines_that_share_an_instance_report_each_their_own(connect: Any) -> None:
    shared = f"stats-{os.getpid()}"
    try:
        first = connect(instance=shared)
        first.cache(first.request("first", PROMPT), BLOCKS, 10)
        second = connect(instance=shared)
        assert second.load(second.request("second", PROMPT), OTHERS) == 4 * BLOCK
        second.cache(second.request("third", OTHER), [21, 22, 23], 30)
        assert wait_until(lambda: first.side.segment.counters()["blocks_stored"] == 6)
        one, two = totals(first), totals(second)
        assert (one["blocks_stored"], one["blocks_loaded"], one["matched_tokens"]) == (4, 0, 0)
        assert (two["blocks_stored"], two["blocks_loaded"], two["matched_tokens"]) == (2, 4, 64)
        assert (one["bytes_loaded"], two["bytes_stored"]) == (0, one["bytes_stored"] // 2)
        whole = first.side.segment.counters()
        for name in one:
            assert one[name] + two[name] == whole[name], name
    finally:
        remove(shared)


def test_an_aborted_load_is_not_a_failure(connect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = connect()
    engine.cache(engine.request("first", PROMPT), BLOCKS, 10)
    request = engine.request("second", PROMPT)
    assert engine.matched(request) == 4 * BLOCK
    engine.allocate(request, OTHERS, 4 * BLOCK)
    assert not engine.scheduler.request_finished(request, OTHERS)[0]  # aborted before it began
    assert wait_until(lambda: engine.step() or "second" in engine.received)
    found = totals(engine)
    assert (found["loads_cancelled"], found["loads_failed"]) == (1, 0)
    assert engine.value(11) == 0
