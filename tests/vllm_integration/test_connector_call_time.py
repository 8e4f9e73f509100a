# SPDX-License-Identifier: Apache-2.0
"""The engine's calls are counted as CPU time of its leader, and are the same calls."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from kvbm._fast.participants import engine_counters
from kvbm.leader.call_time import counted

BLOCK = 16
PROMPT = list(range(3, 3 + 4 * BLOCK + 5))  # four blocks and a bit
WAIT_NS = 2_000_000


class Entered:
    """Notes when it is entered and left."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __enter__(self) -> None:
        self.seen.append("in")

    def __exit__(self, *_: object) -> None:
        self.seen.append("out")


class Side:
    """Has a call that is counted."""

    def __init__(self) -> None:
        self.call_time: Any = Entered()

    @counted
    def halve(self, number: int, *, more: int = 0) -> float:
        """Half of it."""
        self.call_time.seen.append("halve")
        return 1 / number * number * number / 2 + more


def test_a_counted_call_is_the_same_call() -> None:
    side = Side()
    assert (side.halve(8), side.halve(8, more=1)) == (4, 5)
    assert side.call_time.seen == ["in", "halve", "out"] * 2
    assert (Side.halve.__name__, Side.halve.__doc__) == ("halve", "Half of it.")


def test_a_call_that_raises_is_counted_and_still_raises() -> None:
    side = Side()
    with pytest.raises(ZeroDivisionError):
        side.halve(0)
    assert side.call_time.seen == ["in", "halve", "out"]


@pytest.mark.slow  # importing vLLM takes many seconds
@pytest.mark.parametrize(
    ("inner", "hook"),
    [
        ("look_up", "get_num_new_matched_tokens"),
        ("drop_match", "update_state_after_alloc"),
        ("build_step", "build_connector_meta"),
        ("loads_ended", "update_connector_output"),
        ("finish", "request_finished"),
        ("reset", "reset_cache"),
    ],
)
def test_each_of_vllms_calls_is_counted(
    inner: str, hook: str, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = connect()
    request = engine.request("a", PROMPT)
    assert engine.matched(request) == 0
    real = getattr(engine.side.leader, inner)

    def slow(*arguments: Any, **options: Any) -> Any:
        began = time.thread_time_ns()
        while time.thread_time_ns() - began < WAIT_NS:
            pass
        return real(*arguments, **options)

    arguments: dict[str, tuple[Any, ...]] = {
        "get_num_new_matched_tokens": (request, 0),
        "update_state_after_alloc": (request, SimpleNamespace(get_block_ids=lambda: ([1],)), 0),
        "build_connector_meta": (engine.output(),),
        "update_connector_output": (engine.execute(engine.schedule(engine.output())),),
        "request_finished": (request, []),
        "reset_cache": (),
    }
    monkeypatch.setattr(engine.side.leader, inner, slow)
    before = engine_counters(engine.side.segment)["cpu_ns"]
    getattr(engine.scheduler, hook)(*arguments[hook])
    assert engine_counters(engine.side.segment)["cpu_ns"] - before >= WAIT_NS
