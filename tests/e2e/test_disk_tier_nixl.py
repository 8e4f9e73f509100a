# SPDX-License-Identifier: Apache-2.0
"""The disk tier whose bytes NIXL moves: a kill, then two lives of one instance."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from bench.vllm_lab.processes import existing_names
from bench.vllm_lab.results import PhaseResult, RunResult
from bench.vllm_lab.workload import Call, Chat, Replay
from kvbm.errors import ConfigError
from kvbm.instance import remove
from kvbm.tiers.disk import slab_path
from kvbm.transfer.nixl import nixl_library
from tests.e2e.disk import (
    HOST_BLOCKS,
    counters_of,
    damage_all,
    disk_counters,
    last_turn,
    what_is_held,
    with_disk,
)
from tests.e2e.lab import LAST_TURN, TRAFFIC, Lab, assert_same_outputs
from tests.e2e.test_processes import START_S
from tests.leaks import wait_until

INSTANCE = f"e2e-nixl-{os.getpid()}"
NIXL = {"DYN_KVBM_NIXL_BACKEND_POSIX": "1"}

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


@dataclass
class Life:
    """One engine: what it did, and the counters of its disk tier."""

    run: RunResult
    disk: dict[str, int]

    @property
    def held(self) -> dict[str, int]:
        """What was held at the end."""
        facts: dict[str, int] = self.run["held"].value
        return facts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the slabs are; what is in shared memory goes at the end."""
    try:
        nixl_library()
    except ConfigError:
        pytest.skip("NIXL is not installed (pip install --no-deps nixl-cu13)")
    yield tmp_path_factory.mktemp("nixl")
    remove(INSTANCE)


@pytest.fixture(scope="module")
def killed(lab: Lab, folder: Path) -> tuple[str, ...]:
    """Names in shared memory of an engine that was killed while blocks went to disk.

    Its core and its worker are in the process of the front end: a core of its own costs the tests
    another import of vLLM, and is in test_processes.py.
    """
    with lab.start(with_disk(lab, folder, **NIXL), [Chat("killed", TRAFFIC)]) as engine:
        engine.wait_for(lambda message: message[0] == "request" and message[2] >= 8, START_S)
        names = engine.mapped_names()
        (disk,) = [name for name in names if name.endswith(".disk")]
        instance = disk.removeprefix("kvbm-").removesuffix(".disk")
        assert wait_until(lambda: disk_counters(instance)["blocks_stored"] > 0, 60.0)
        engine.kill()
    assert list(folder.iterdir()) == []
    return names


@pytest.fixture(scope="module")
def first(lab: Lab, folder: Path, killed: tuple[str, ...]) -> Life:
    """The traffic, and its last turn again."""
    run = lab.run(
        with_disk(lab, folder, **NIXL, DYN_KVBM_INSTANCE=INSTANCE),
        Chat("chat", TRAFFIC),
        Replay("again", "chat", turns=(LAST_TURN,), latest_first=True),
        Call("held", what_is_held),
    )
    return Life(run, disk_counters(INSTANCE))


@pytest.fixture(scope="module")
def rebooted(lab: Lab, folder: Path, first: Life) -> Life:
    """With nothing left in shared memory; the slab is damaged after some requests."""
    remove(INSTANCE)
    run = lab.run(
        with_disk(lab, folder, **NIXL, DYN_KVBM_INSTANCE=INSTANCE),
        last_turn(lab, "good", end=3),
        Call("good counters", counters_of, (INSTANCE,)),
        Call("damage", damage_all, (slab_path(folder, INSTANCE, 0),)),
        last_turn(lab, "damaged", first=3),
        Call("held", what_is_held),
    )
    return Life(run, disk_counters(INSTANCE))


def all_prompts(life: Life) -> PhaseResult:
    """The requests before and after the damage as one phase."""
    good, damaged = life.run["good"], life.run["damaged"]
    return replace(good, requests=good.requests + damaged.requests)


def assert_nothing_held(life: Life) -> None:
    facts = {fact: life.held[fact] for fact in ("in use", "held", "tracked", "held on disk")}
    assert facts == dict.fromkeys(facts, 0)
    assert life.held["errors"] == 0


def test_after_kill_9_of_the_engine_nothing_is_left(first: Life, killed: tuple[str, ...]) -> None:
    assert len(killed) >= 3
    assert existing_names(killed) == []  # the next engine has removed them


def test_what_left_the_host_comes_back_through_nixl_with_equal_outputs(
    lab: Lab, first: Life
) -> None:
    assert_same_outputs(lab.reference(), first.run["chat"], first.run["again"])
    assert first.disk["blocks_stored"] > HOST_BLOCKS
    assert first.disk["blocks_loaded"] > 0
    assert (first.disk["stores_failed"], first.disk["loads_failed"]) == (0, 0)
    moved = first.disk["blocks_stored"] + first.disk["blocks_loaded"]
    assert first.held.get("moved by NIXL", moved) == moved
    assert_nothing_held(first)


def test_after_a_reboot_the_first_request_is_served_from_disk(lab: Lab, rebooted: Life) -> None:
    assert_same_outputs(lab.reference(), all_prompts(rebooted))
    request = rebooted.run["good"].requests[0]
    assert request.cached_tokens >= 0.8 * (len(request.prompt) - 1) // 32 * 32 > 0
    counters = rebooted.run["good counters"].value
    assert counters["blocks_loaded"] > 0
    assert counters["loads_failed"] == 0


def test_blocks_damaged_on_disk_are_recomputed_with_equal_outputs(lab: Lab, rebooted: Life) -> None:
    assert rebooted.run["damage"].value > HOST_BLOCKS
    assert_same_outputs(lab.reference(), all_prompts(rebooted))
    assert rebooted.disk["loads_failed"] > 0
    assert_nothing_held(rebooted)
