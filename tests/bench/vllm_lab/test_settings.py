# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench.vllm_lab.settings import (
    CUDA_ENVIRONMENT,
    CUDA_GRAPHS,
    KVBM_TRANSFER_CONFIG,
    EngineSettings,
)

PLAIN = EngineSettings(model=Path("model"))


def test_a_connector_is_passed_only_if_there_is_one() -> None:
    assert "kv_transfer_config" not in PLAIN.llm_arguments()
    with_kvbm = EngineSettings(model=Path("model"), kv_transfer_config=KVBM_TRANSFER_CONFIG)
    assert with_kvbm.llm_arguments()["kv_transfer_config"] == KVBM_TRANSFER_CONFIG


def test_extra_arguments_win() -> None:
    changed = EngineSettings(model=Path("model"), extra_arguments={"dtype": "bfloat16"})
    assert changed.llm_arguments()["dtype"] == "bfloat16"


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that is put back after the test, whatever it sets."""
    monkeypatch.setattr(os, "environ", os.environ.copy())


@pytest.mark.usefixtures("clean_environment")
def test_variables_of_the_caller_do_not_reach_the_engine() -> None:
    os.environ["DYN_KVBM_CPU_CACHE_GB"] = "7"
    os.environ["DYN_KVBM_INSTANCE"] = "callers"
    settings = EngineSettings(model=Path("model"), environment={"DYN_KVBM_CPU_CACHE_GB": "1"})
    settings.apply_environment()
    assert os.environ["DYN_KVBM_CPU_CACHE_GB"] == "1"
    assert "DYN_KVBM_INSTANCE" not in os.environ
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


@pytest.mark.usefixtures("clean_environment")
def test_each_rank_gets_a_core_and_too_few_cores_are_an_error() -> None:
    cores = sorted(os.sched_getaffinity(0))
    one = EngineSettings(model=Path("model"), worker_processes=True)
    one.apply_environment()
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == str(cores[0])
    many = EngineSettings(
        model=Path("model"), worker_processes=True, tensor_parallel=len(cores) + 1
    )
    with pytest.raises(RuntimeError, match=f"tensor_parallel={len(cores) + 1}"):
        many.apply_environment()


@pytest.mark.usefixtures("clean_environment")
def test_an_engine_on_a_device_gets_what_that_needs_and_no_cores() -> None:
    settings = EngineSettings(model=Path("model"), device="cuda", worker_processes=True)
    settings.apply_environment()
    assert os.environ.items() >= CUDA_ENVIRONMENT.items()
    assert "VLLM_CPU_OMP_THREADS_BIND" not in os.environ


def test_steps_are_graphs_where_they_are_asked_for() -> None:
    eager = EngineSettings(model=Path("model"), device="cuda")
    graphs = EngineSettings(model=Path("model"), device="cuda", cuda_graphs=True)
    assert eager.llm_arguments()["enforce_eager"] is True
    assert graphs.llm_arguments() == eager.llm_arguments() | CUDA_GRAPHS
