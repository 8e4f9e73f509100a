# SPDX-License-Identifier: Apache-2.0
"""Engines in several processes, and engines that are killed."""

from __future__ import annotations

import os
import signal

import pytest

from bench.vllm_lab.engine import EngineRun, Message
from bench.vllm_lab.processes import existing_names, process_title
from bench.vllm_lab.workload import Chat, Replay
from tests.e2e.lab import LAST_TURN, TRAFFIC, Lab, assert_same_outputs
from tests.leaks import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

START_S = 300.0
WORKERS_END_S = 60.0


def half_of_the_requests_done(message: Message) -> bool:
    """Whether the message says that half of the traffic is through."""
    return message[0] == "request" and message[2] >= TRAFFIC.request_count() // 2


def process_named(engine: EngineRun, title: str) -> int:
    """Id of the engine's process with that title."""
    found = [pid for pid in engine.processes() if title in process_title(pid)]
    assert len(found) == 1, [process_title(pid) for pid in engine.processes()]
    return found[0]


def test_two_tensor_parallel_ranks_give_the_outputs_of_one_engine_without_kvbm(lab: Lab) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    run = lab.run(
        lab.with_kvbm(tensor_parallel=2, worker_processes=True),
        Chat("chat", TRAFFIC),
        Replay("again", "chat", turns=(LAST_TURN,)),
    )
    assert_same_outputs(lab.reference(), run["chat"], run["again"])
    assert run["chat"].external_hit_tokens > 0
    assert run["again"].external_hit_tokens > 0
    ranks = [name.rpartition(".host.")[2] for name in run.shared_objects if ".host." in name]
    assert ranks == ["0", "1"]


def test_after_kill_9_of_the_engine_the_next_one_works_and_cleans_up(lab: Lab) -> None:
    with lab.start(lab.with_kvbm(), [Chat("killed", TRAFFIC)]) as engine:
        engine.wait_for(half_of_the_requests_done, START_S)
        names = engine.mapped_names()
        assert existing_names(names) == list(names) != []
        engine.kill()
        assert engine.processes() == []
    run = lab.run(lab.with_kvbm(), Chat("chat", TRAFFIC))
    assert_same_outputs(lab.reference(), run["chat"])
    assert run["chat"].external_hit_tokens > 0
    assert existing_names(names) == []


def test_after_kill_9_of_the_engine_core_its_workers_end_and_the_next_one_cleans_up(
    lab: Lab,
) -> None:
    settings = lab.with_kvbm(worker_processes=True)
    with lab.start(settings, [Chat("killed", TRAFFIC)]) as engine:
        engine.wait_for(half_of_the_requests_done, START_S)
        names = engine.mapped_names()
        assert existing_names(names) == list(names) != []
        os.kill(process_named(engine, "EngineCore"), signal.SIGKILL)
        # The front end of an offline engine ends as well, or waits for ever for the core's answer.
        assert wait_until(lambda: set(engine.processes()) <= {engine.pid}, WORKERS_END_S)
        engine.kill()
    run = lab.run(lab.with_kvbm(), Chat("chat", TRAFFIC))
    assert_same_outputs(lab.reference(), run["chat"])
    assert existing_names(names) == []
