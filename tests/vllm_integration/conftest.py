# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests against vLLM's own classes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.leaks import wait_until

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def connect() -> Iterator[Callable[..., Any]]:
    """Make connected engines; each is proven to hold nothing when the test is over."""
    from tests.vllm_integration.connected import Connected

    made: list[Connected] = []

    def make(*arguments: Any, **options: Any) -> Connected:
        made.append(Connected(*arguments, **options))
        return made[-1]

    yield make
    try:
        for engine in made:
            for request in list(engine.requests.values()):
                engine.scheduler.request_finished(request, [])
            engine.step()
            leader = engine.side.leader
            assert wait_until(lambda e=engine: e.step() and not _left(e))
            assert leader.table.held() == {}
    finally:
        for engine in made:
            engine.close()


def _left(engine: Any) -> dict[str, Any]:
    leader = engine.side.leader
    return leader._storing or leader._loading or leader.sequences or leader._uncollected
