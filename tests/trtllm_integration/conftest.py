# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests against the recorded interface of TensorRT-LLM."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.leaks import wait_until
from tests.trtllm_integration.interface import installed

if TYPE_CHECKING:
    from tests.trtllm_integration.engine import Engine

if importlib.util.find_spec("torch") is None:
    collect_ignore_glob = ["test_*.py"]
elif any(importlib.util.find_spec(name) is None for name in ("zmq", "msgspec")):
    collect_ignore = ["test_consolidator_config.py"]


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of these tests, whatever the environment is."""
    for name in [name for name in os.environ if name.startswith("DYN_KVBM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS", "64")


@pytest.fixture(params=["1.3"])
def interface(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The module with the interface's classes; importable as TensorRT-LLM has it."""
    with installed(request.param) as module:
        yield module


@pytest.fixture
def serve(interface: Any) -> Iterator[Callable[..., Engine]]:
    """Make engines; each is proven to have computed from right KV only, and to hold nothing."""
    from tests.trtllm_integration.engine import Engine

    made: list[Engine] = []

    def make(**options: Any) -> Engine:
        made.append(Engine(interface, **options))
        return made[-1]

    yield make
    try:
        for engine in made:
            assert engine.wrong == []
            if engine.side._cache is not None and not engine.is_over:
                leader = engine.side.leader
                assert wait_until(lambda one=engine: _ended(one))
                for request_id in list(leader.sequences):
                    leader.abandon(request_id)
                assert wait_until(lambda one=engine: _ended(one))
                assert leader.table.held() == {}
    finally:
        for engine in made:
            engine.close()


def _ended(engine: Engine) -> bool:
    """Have the leader look once more, as in a step that nothing is scheduled in."""
    engine.side.build_step(engine.output([]))
    leader = engine.side.leader
    return not (leader._storing or leader._loading or leader._uncollected)
