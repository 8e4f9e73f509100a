# SPDX-License-Identifier: Apache-2.0
"""Priorities, the disk behind the host tier, and the end of the wait for workers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.leaks import wait_until
from tests.trtllm_integration.engine import BLOCK, Engine, Request, arguments

Serve = Callable[..., Engine]
PROMPT = list(range(3, 3 + 4 * BLOCK + 5))  # four blocks and a bit
WHOLE = 4 * BLOCK


@pytest.mark.parametrize(("priority", "found"), [(None, 0), (34, 0), (35, WHOLE), (100, WHOLE)])
def test_blocks_of_a_lower_priority_are_not_offloaded(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, priority: int | None, found: int
) -> None:
    monkeypatch.setenv("DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY", "35")
    engine = serve()
    engine.serve(Request(1, list(PROMPT), priority=priority))
    engine.serve(Request(2, list(PROMPT)))
    assert engine.loaded[2] == found


def test_what_follows_a_block_of_low_priority_is_not_offloaded_either(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY", "35")
    engine = serve(chunk=2 * BLOCK)
    output = engine.output

    def mixed(running: Any) -> Any:
        made = output(running)
        for data in made.new_requests:
            data.priorities = [90, 90, 10, 90, 90]
        return made

    engine.output = mixed  # type: ignore[method-assign]
    engine.serve(Request(1, list(PROMPT), max_new=2 * BLOCK))
    engine.output = output  # type: ignore[method-assign]
    engine.serve(Request(2, list(PROMPT)))
    assert engine.loaded[2] == 2 * BLOCK


def test_a_step_offloads_with_the_least_priority_of_its_blocks(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = serve(chunk=2 * BLOCK)
    given: list[int] = []
    store = engine.side.leader.store

    def noted(sequence: Any, upto: int, priority: int = 0) -> None:
        given.append(priority)
        store(sequence, upto, priority)

    monkeypatch.setattr(engine.side.leader, "store", noted)
    output = engine.output

    def mixed(running: Any) -> Any:
        made = output(running)
        for data in made.new_requests:
            data.priorities = [90, 80, 10, 70, 60]
        return made

    engine.output = mixed  # type: ignore[method-assign]
    engine.serve(Request(1, list(PROMPT)))
    assert given == [80, 10]


def test_what_is_on_disk_is_there_for_the_next_request(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS", "5")
    monkeypatch.setenv("DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS", "64")
    monkeypatch.setenv("DYN_KVBM_DISK_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER", "1")
    engine = serve()
    engine.serve(Request(1, list(PROMPT)))
    numbers = iter(range(2, 10_000))
    disk = engine.side.leader.disk

    def matched() -> int:
        request = Request(next(numbers), list(PROMPT))
        tokens, _ = engine.scheduler.get_num_new_matched_tokens(request, 0)
        engine.scheduler.request_finished(request, [])
        return tokens

    assert wait_until(lambda: engine.side.leader.collect() or (disk.disk and disk.is_idle))
    assert matched() == WHOLE  # used again: to disk with it
    assert wait_until(lambda: engine.side.leader.collect() or disk.is_idle)
    other = next(numbers)
    engine.serve(Request(other, [other] * len(PROMPT)))  # it leaves host memory
    assert matched() < WHOLE
    assert wait_until(lambda: engine.side.leader.collect() or matched() == WHOLE)


def test_block_reuse_that_is_off_is_told(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = serve(waits=False)
    engine.side._llm_args.kv_cache_config.enable_block_reuse = False
    engine.scheduler.wait_for_initialization()
    assert "enable_block_reuse" in caplog.text


def test_workers_that_do_not_come_are_given_up_without_a_wait(
    interface: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from kvbm.trtllm_integration.connector import DynamoKVBMConnectorLeader

    monkeypatch.setenv("DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS", "1")
    scheduler = DynamoKVBMConnectorLeader(arguments())
    request = Request(1, list(PROMPT))
    assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    assert not caplog.records
    scheduler._leader._began -= 2
    with caplog.at_level(logging.ERROR):
        for _ in range(2):
            assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
            scheduler.update_state_after_alloc(request, [1])
            assert scheduler.build_connector_meta(None).lost == []
            assert not scheduler.request_finished(request, [1])
    assert caplog.text.count("have announced themselves") == 1
