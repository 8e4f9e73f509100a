# SPDX-License-Identifier: Apache-2.0
"""A short soak: everything that `make soak` does for half an hour, for some seconds."""

from __future__ import annotations

import pytest

from tests.e2e.lab import Lab
from tests.soak.pool import pool_of
from tests.soak.report import ABORTS, FAULTS, EngineSoak, problems
from tests.soak.run import Soak, run_soak

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

SHORT = Soak(seed=1, rounds=5, round_s=5.0, host_blocks=64)


@pytest.fixture(scope="module")
def soak(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> EngineSoak:
    pool = pool_of(lab.reference().requests)
    log = tmp_path_factory.mktemp("soak") / "engine.log"
    return run_soak(lab.plain().model, SHORT, pool, log)


def test_outputs_are_right_and_nothing_is_left(soak: EngineSoak) -> None:
    assert problems(soak) == []


@pytest.mark.parametrize("what", [ABORTS, FAULTS, "preempted all", "reset connector"])
def test_traffic_was_disturbed(soak: EngineSoak, what: str) -> None:
    assert soak.total(what) > 0


def test_the_host_tier_was_used_and_too_small(soak: EngineSoak) -> None:
    assert soak.kvbm_counters["kvbm_onboard_blocks_h2d"] > 0
    assert soak.kvbm_counters["kvbm_evicted_blocks"] > SHORT.host_blocks
