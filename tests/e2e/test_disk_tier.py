# SPDX-License-Identifier: Apache-2.0
"""A host tier smaller than the traffic, a disk behind it: several lives of one instance."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.vllm_lab.results import RunResult
from bench.vllm_lab.settings import EngineSettings
from bench.vllm_lab.workload import Call, Chat, Replay
from kvbm.instance import remove
from kvbm.tiers.disk import read_slab, slab_path
from tests.e2e.disk import HOST_BLOCKS, damage, disk_counters, last_turn, pace, with_disk
from tests.e2e.lab import TRAFFIC, Lab, assert_same_outputs, cached_tokens
from tests.leaks import wait_until

INSTANCE = f"e2e-disk-{os.getpid()}"

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the slab is; what is in shared memory goes at the end."""
    yield tmp_path_factory.mktemp("disk")
    remove(INSTANCE)


@pytest.fixture(scope="module")
def settings(lab: Lab, folder: Path) -> EngineSettings:
    """An engine of the instance that writes every block to disk."""
    return with_disk(lab, folder, DYN_KVBM_INSTANCE=INSTANCE)


@pytest.fixture(scope="module")
def first_life(lab: Lab, settings: EngineSettings) -> tuple[RunResult, dict[str, int]]:
    """The traffic, and all of it again."""
    run = lab.run(
        settings,
        Call("pace", pace),
        Chat("chat", TRAFFIC),
        Replay("again", "chat", latest_first=True),
    )
    return run, disk_counters(INSTANCE)


@pytest.fixture(scope="module")
def after_a_reboot(
    lab: Lab, settings: EngineSettings, first_life: object
) -> tuple[RunResult, dict[str, int]]:
    """The next engine, with nothing left in shared memory."""
    remove(INSTANCE)
    return lab.run(settings, last_turn(lab)), disk_counters(INSTANCE)


def test_what_left_the_host_comes_back_from_disk_with_equal_outputs(
    lab: Lab, first_life: tuple[RunResult, dict[str, int]]
) -> None:
    run, disk = first_life
    assert_same_outputs(lab.reference(), run["chat"], run["again"])
    assert disk["blocks_stored"] > HOST_BLOCKS
    assert disk["blocks_loaded"] > 0
    assert (disk["stores_failed"], disk["loads_failed"]) == (0, 0)
    assert run["again"].kvbm_counters["kvbm_errors"] == 0


def test_most_of_what_the_host_forgot_is_reused(
    first_life: tuple[RunResult, dict[str, int]],
) -> None:
    run, _ = first_life
    reusable = sum(request.reusable_tokens for request in run["again"].requests)
    assert cached_tokens(run["again"]) > 0.8 * reusable


def test_after_a_reboot_the_first_request_is_served_from_disk(
    lab: Lab, after_a_reboot: tuple[RunResult, dict[str, int]]
) -> None:
    run, disk = after_a_reboot
    assert_same_outputs(lab.reference(), run["last turn"])
    first = run["last turn"].requests[0]
    assert first.cached_tokens >= 0.8 * (len(first.prompt) - 1) // 32 * 32 > 0
    assert disk["blocks_loaded"] > 0
    assert disk["loads_failed"] == 0


def test_damaged_slots_are_recomputed_with_equal_outputs(
    lab: Lab, settings: EngineSettings, folder: Path, after_a_reboot: object
) -> None:
    remove(INSTANCE)
    damage(slab_path(folder, INSTANCE, 0), every=3)
    run = lab.run(settings, last_turn(lab))
    assert_same_outputs(lab.reference(), run["last turn"])
    assert disk_counters(INSTANCE)["loads_failed"] > 0


def test_a_kill_while_blocks_are_written_leaves_right_blocks_only(
    lab: Lab, settings: EngineSettings, folder: Path
) -> None:
    slab_path(folder, INSTANCE, 0).unlink()
    remove(INSTANCE)
    slab = slab_path(folder, INSTANCE, 0)

    def blocks() -> int:
        found = read_slab(slab) if slab.exists() else None
        return 0 if found is None else len(found[1])

    with lab.start(settings, [Chat("chat", TRAFFIC)]) as engine:
        engine.wait_for(lambda message: message[0] == "request" and message[2] >= 8, 120.0)
        assert wait_until(lambda: blocks() > 0, 60.0)
        engine.kill()
    remove(INSTANCE)
    assert blocks() > 0
    run = lab.run(settings, last_turn(lab))
    assert_same_outputs(lab.reference(), run["last turn"])
    assert disk_counters(INSTANCE)["loads_failed"] == 0
