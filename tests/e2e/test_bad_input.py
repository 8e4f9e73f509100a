# SPDX-License-Identifier: Apache-2.0
"""Starts of real vLLM with settings that are wrong, and with things in the way."""

from __future__ import annotations

import functools
import re
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.vllm_lab.engine import EngineFailed, EngineRun
from bench.vllm_lab.processes import KVBM_PREFIX, SHARED_MEMORY
from bench.vllm_lab.settings import EngineSettings
from bench.vllm_lab.workload import Replay, Send
from kvbm.fingerprint import Fingerprint
from kvbm.shared import SegmentSpec, open_as_leader
from kvbm.tiers.host import HostArena
from tests.e2e.lab import Lab, assert_same_outputs
from tests.mounts import mount_read_only, mount_small_shared_memory, why_no_mounts
from tests.tiers.test_host import HEADER

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

START_S = 300.0
LAST_LINES = 12
MIB = 1 << 20


def failed_start(lab: Lab, settings: EngineSettings) -> tuple[str, list[str]]:
    """How a start fails: the last line of the caller's traceback, and the last lines of output."""
    log = lab.new_log()
    with EngineRun(settings, [], log) as run, pytest.raises(EngineFailed) as caught:
        run.result(START_S)
    report = str(caught.value).partition(f"{log}:")[0]
    return report.strip().splitlines()[-1], log.read_text(errors="replace").splitlines()


def test_without_a_tier_the_engine_core_ends_with_what_to_set_in_its_last_lines(lab: Lab) -> None:
    settings = lab.with_kvbm({"DYN_KVBM_CPU_CACHE_GB": "0"}, worker_processes=True)
    error, lines = failed_start(lab, settings)
    assert "See root cause above" in error
    shown = "\n".join(lines[-LAST_LINES:])
    assert "no cache tier is configured" in shown
    assert "DYN_KVBM_CPU_CACHE_GB=20" in shown
    assert any("kvbm.errors.ConfigError: no cache tier is configured" in line for line in lines)


def test_a_value_of_the_wrong_type_is_the_error_that_the_caller_gets(lab: Lab) -> None:
    settings = lab.with_kvbm()
    assert settings.kv_transfer_config is not None
    extra = {"cpu_cache_gb": [20], "metrics_port": "http"}
    settings.kv_transfer_config["kv_connector_extra_config"] = extra
    error, _ = failed_start(lab, settings)
    assert error == (
        "kvbm.errors.ConfigError: kv_connector_extra_config['cpu_cache_gb']=[20] is not valid "
        "(allowed: decimal number >= 0, in GB (1e9 bytes)); "
        "kv_connector_extra_config['metrics_port']='http' is not valid "
        "(allowed: integer, 1 to 65535)"
    )


def test_a_shared_memory_that_is_too_small_is_refused_with_ways_to_enlarge_it(lab: Lab) -> None:
    if problem := why_no_mounts():
        pytest.skip(problem)
    prepare = functools.partial(mount_small_shared_memory, 64 * MIB)  # as Docker gives by default
    error, _ = failed_start(lab, lab.with_kvbm(prepare=prepare))
    found = re.fullmatch(
        r"kvbm\.errors\.ConfigError: DYN_KVBM_CPU_CACHE_GB=0\.1: the host tier needs 100000000 "
        r"bytes \(0\.100 GB\) in /dev/shm, which has (\d+) bytes \(0\.067 GB\) free of (\d+)\. .*",
        error,
    )
    assert found, error
    assert int(found[1]) <= int(found[2]) == 64 * MIB
    for way in ("mount -o remount,size=1G /dev/shm", "--shm-size=1g", "sizeLimit: 1Gi"):
        assert way in error


@pytest.fixture
def stale() -> Iterator[str]:
    """Name of a cache that another model has left; removed at the end."""
    name = f"e2e-{uuid.uuid4().hex[:12]}"
    arena = HostArena(name, HEADER, exclusive=False)
    left_by = Fingerprint({"engine": "vllm 0.1.0", "model": "another model"})
    segment = open_as_leader(SegmentSpec(name, 8, 1, 16, left_by, (0,)), engine=1)
    arena.belong_to(segment.nonce)
    segment.close()
    arena.close()
    yield name
    for path in SHARED_MEMORY.glob(f"{KVBM_PREFIX}{name}*"):
        path.unlink()


def test_a_cache_of_another_model_and_a_disk_that_cannot_be_written_cost_a_line_each(
    lab: Lab, stale: str, tmp_path: Path
) -> None:
    if problem := why_no_mounts():
        pytest.skip(problem)
    environment = {
        "DYN_KVBM_INSTANCE": stale,
        "DYN_KVBM_DISK_CACHE_GB": "0.01",
        "DYN_KVBM_DISK_CACHE_DIR": str(tmp_path),
    }
    settings = lab.with_kvbm(environment, prepare=functools.partial(mount_read_only, tmp_path))
    log = lab.new_log()
    phases = [Send("first", lab.last_prompts()), Replay("again", "first", latest_first=True)]
    with EngineRun(settings, phases, log) as engine:
        run = engine.result()
    assert_same_outputs(lab.reference(), run["first"], run["again"])
    assert run["first"].requests[0].cached_tokens == 0
    assert run["again"].external_hit_tokens > 0
    assert run["again"].kvbm_counters["kvbm_errors"] == 0
    lines = log.read_text(errors="replace").splitlines()
    (clean,) = [line for line in lines if "starting clean" in line]
    assert f"shared-memory object /kvbm-{stale} has fingerprint" in clean
    assert "another model" in clean
    (disk,) = [line for line in lines if "there is no disk tier" in line]
    assert "Read-only file system" in disk
    assert f"DYN_KVBM_DISK_CACHE_DIR={tmp_path} to another folder" in disk
    assert not [line for line in lines if 'File "' in line and "/kvbm/" in line]  # no traceback
