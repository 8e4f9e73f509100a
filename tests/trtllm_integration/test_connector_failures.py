# SPDX-License-Identifier: Apache-2.0
"""Whatever fails, nothing is computed from wrong KV and nothing wrong is stored."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from kvbm.errors import TransferError
from tests.leaks import wait_until
from tests.trtllm_integration.engine import BLOCK, Engine, Request

Serve = Callable[..., Engine]
PROMPT = list(range(3, 3 + 4 * BLOCK + 5))  # four blocks and a bit
WHOLE = 4 * BLOCK


def in_flight(engine: Engine, request: Request) -> list[Request]:
    """Have a step of a request bound, and its forward pass not run: its stores wait."""
    engine.add(request)
    return engine.prepare([request])


# ---- loads that fail -----------------------------------------------------------------------------
def test_a_promised_load_that_does_not_arrive_ends_the_engine_before_anything_runs(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = serve(ranks=2)
    engine.serve(Request(1, list(PROMPT)))
    worker = engine.workers[1]._worker._worker
    second = engine.add(Request(2, list(PROMPT)))
    with monkeypatch.context() as patch:
        # Its copy thread ends at the moment at which the load is submitted.
        load = engine.side.leader.load
        patch.setattr(engine.side.leader, "load", lambda *given: (load(*given), stop(worker)))
        batch = engine.prepare([second])
    assert engine.loaded[2] == WHOLE
    assert batch == []
    engine.run_until(lambda: second.state == "context")  # reported as ended, with the others'
    ran: list[int] = []
    engine.forward = lambda: ran.append(1)
    with pytest.raises(TransferError, match="requests 2 was promised"):
        engine.step()
    assert ran == []
    assert engine.counter("errors") == 1


def stop(worker: Any) -> None:
    """End a copy thread as an error in it would."""
    worker.loop.stop()
    assert wait_until(lambda: not worker.copying)


def test_all_ranks_end_in_the_same_step(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = serve(ranks=2)
    engine.serve(Request(1, list(PROMPT)))
    monkeypatch.setattr(engine.side.leader, "_submit_load", lambda *_: False)
    engine.add(Request(2, list(PROMPT)))
    metadata: list[Any] = []
    build = engine.scheduler.build_connector_meta

    def noted(output: Any) -> Any:
        metadata.append(build(output))
        return metadata[-1]

    monkeypatch.setattr(engine.scheduler, "build_connector_meta", noted)
    with pytest.raises(TransferError):
        engine.step()
    assert metadata[-1].lost == ["2"]
    for worker in engine.workers:
        with pytest.raises(TransferError):
            worker.bind_connector_meta(metadata[-1])


def test_a_load_that_cannot_be_planned_is_not_taken_for_loaded(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = serve()
    engine.serve(Request(1, list(PROMPT)))
    monkeypatch.setattr(engine.side.leader, "load", lambda *_: 1 / 0)
    second = engine.add(Request(2, list(PROMPT)))
    engine.step()
    engine.run_until(lambda: second.state == "context")
    with pytest.raises(TransferError):
        engine.step()


def test_what_is_not_taken_for_loaded_is_not_loaded(serve: Serve) -> None:
    """A version that honours less than it was promised: the load is as long as that."""
    engine = serve()
    engine.serve(Request(1, list(PROMPT)))
    allocated = engine.scheduler.update_state_after_alloc
    second = engine.add(Request(2, list(PROMPT)))

    def shorter(request: Request, blocks: list[int]) -> None:
        if request is second:
            request.context_current_position = 2 * BLOCK
        allocated(request, blocks)

    engine.scheduler.update_state_after_alloc = shorter
    engine.run_until(lambda: second.state == "finished")
    assert engine.counter("blocks_loaded") == 2
    third = engine.add(Request(3, list(PROMPT)))

    def nothing(request: Request, blocks: list[int]) -> None:
        request.context_current_position = 0
        allocated(request, blocks)

    engine.scheduler.update_state_after_alloc = nothing
    engine.run_until(lambda: third.state == "finished")
    assert engine.counter("blocks_loaded") == 2


def test_a_load_is_promised_only_if_operations_for_it_are_free(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = serve()
    engine.serve(Request(1, list(PROMPT)))
    table = SimpleNamespace(free_operations=lambda: 1)
    monkeypatch.setattr(engine.side, "leader", Fewer(engine.side.leader, table))
    asked = [Request(number, list(PROMPT)) for number in (2, 3)]
    answers = [engine.scheduler.get_num_new_matched_tokens(request, 0) for request in asked]
    assert answers == [(WHOLE, True), (0, False)]
    monkeypatch.undo()


class Fewer:
    """A leader with another table."""

    def __init__(self, leader: Any, table: Any) -> None:
        self._leader, self.table = leader, table

    def __getattr__(self, name: str) -> Any:
        return getattr(self._leader, name)


# ---- requests that are freed without a word ------------------------------------------------------
def test_a_step_that_never_ran_stores_nothing(serve: Serve) -> None:
    engine = serve()
    first = Request(1, list(PROMPT))
    assert in_flight(engine, first) == [first]
    engine.cancel(first)
    engine.serve(Request(2, [8, 9, 10]))
    engine.serve(Request(3, list(PROMPT)))
    assert engine.loaded[3] == 0


def test_stores_of_a_request_that_is_in_no_step_any_more_are_stopped(serve: Serve) -> None:
    engine = serve()
    first = Request(1, list(PROMPT), max_new=9)
    in_flight(engine, first)
    handles = engine.side.leader.sequences["1"].stores
    assert handles
    engine.cancel(first)
    metadata = engine.scheduler.build_connector_meta(engine.output([]))
    assert metadata.step.stop == handles
    assert engine.side.leader.sequences["1"].stores == []


@pytest.mark.parametrize("told", ["at admission", "in a step"])
def test_stores_from_blocks_that_another_request_gets_are_stopped(serve: Serve, told: str) -> None:
    engine = serve()
    first = Request(1, list(PROMPT), max_new=9)  # it does not say that it is over
    in_flight(engine, first)
    handles = list(engine.side.leader.sequences["1"].stores)
    assert handles
    taken = [first.blocks[2]]
    second = Request(2, [1] * (BLOCK - 1), blocks=taken, chunk=BLOCK - 1)
    if told == "at admission":
        engine.scheduler.update_state_after_alloc(second, taken)
        metadata = engine.scheduler.build_connector_meta(engine.output([]))
    else:
        metadata = engine.scheduler.build_connector_meta(engine.output([second]))
    assert metadata.step.stop == handles
    engine.active.clear()
    engine.workers[0].bind_connector_meta(metadata)
    engine.workers[0].start_load_kv(SimpleNamespace())
    engine.serve(Request(3, list(PROMPT)))
    assert engine.loaded[3] == 0


def test_a_request_that_paused_is_stored_when_it_goes_on(serve: Serve) -> None:
    engine = serve(chunk=2 * BLOCK)
    first = Request(1, list(PROMPT))
    in_flight(engine, first)
    engine.active.remove(first)
    engine.serve(Request(2, [8, 9, 10]))  # a step without it: its first chunk is not stored
    engine.serve(first)
    engine.serve(Request(3, list(PROMPT)))
    assert engine.loaded[3] == WHOLE


def test_a_load_into_blocks_that_another_request_gets_is_waited_for(serve: Serve) -> None:
    engine = serve()
    engine.serve(Request(1, list(PROMPT)))
    first = engine.add(Request(2, list(PROMPT)))
    engine.admit(first)
    engine.scheduler.update_state_after_alloc(first, list(first.blocks))
    handles = list(engine.side.leader.sequences["2"].loads)
    assert handles
    blocks = list(first.blocks)
    engine.starting_loads.clear()
    engine.scheduler.update_state_after_alloc(
        Request(3, [1] * BLOCK), [99, blocks[2]]
    )  # reuse is off: no look-up
    metadata = engine.scheduler.build_connector_meta(engine.output([]))
    assert metadata.wait == handles
    engine.active.clear()
    engine.workers[0].bind_connector_meta(metadata)
    engine.workers[0].start_load_kv(SimpleNamespace())  # the load began with this step: it is next
    assert wait_until(lambda: engine.workers[0]._worker._worker.wait_until_ended(handles, 0))


def test_a_wait_for_a_load_that_does_not_end_ends_the_engine(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = serve()
    from kvbm.trtllm_integration.step import EngineStep

    worker = engine.workers[0]
    monkeypatch.setattr(worker._worker._worker, "wait_until_ended", lambda *_: False)
    worker.bind_connector_meta(EngineStep(wait=[1]))
    with pytest.raises(TransferError, match="does not end"):
        worker.start_load_kv(SimpleNamespace())
    worker._worker._unbound.clear()


def test_a_request_that_ends_while_it_is_loaded_keeps_its_blocks_until_then(serve: Serve) -> None:
    engine = serve()
    engine.serve(Request(1, list(PROMPT)))
    second = engine.add(Request(2, list(PROMPT)))
    engine.admit(second)
    engine.scheduler.update_state_after_alloc(second, list(second.blocks))
    assert engine.scheduler.request_finished(second, list(second.blocks))
    engine.active.remove(second)
    metadata = engine.scheduler.build_connector_meta(engine.output([]))
    worker = engine.workers[0]
    worker.bind_connector_meta(metadata)
    worker.start_load_kv(SimpleNamespace())
    told: set[int] = set()

    def saved() -> bool:
        first = not told
        told.add(2)
        return worker.get_finished([2] if first else [], [])[0] == [2]

    engine.starting_loads.clear()
    assert wait_until(saved)
    assert wait_until(
        lambda: engine.scheduler.build_connector_meta(engine.output([])) and not engine.side._known
    )


def test_requests_that_no_step_has_for_long_are_forgotten(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = serve()
    from kvbm.trtllm_integration import connector_leader

    monkeypatch.setattr(connector_leader, "FORGET_STEPS", 3)
    monkeypatch.setattr(connector_leader, "FORGET_EVERY", 1)
    first = engine.add(Request(1, list(PROMPT), max_new=99))
    engine.step()
    engine.cancel(first)
    for _ in range(5):
        engine.scheduler.build_connector_meta(engine.output([]))
    assert engine.side._known == {}
    assert engine.side.leader.sequences == {}


def test_a_finished_request_is_told_once_its_copies_have_ended_and_not_before(serve: Serve) -> None:
    engine = serve()
    request = Request(1, list(PROMPT))
    in_flight(engine, request)  # its copies wait for the forward pass
    engine.active.clear()
    assert engine.scheduler.request_finished(request, list(request.blocks))
    worker = engine.workers[0]
    for number in range(20):
        assert worker.get_finished([] if number else [1], []) == ([], [])
    worker.wait_for_save(SimpleNamespace())
    assert wait_until(lambda: worker.get_finished([], []) == ([1], []))
    assert worker.get_finished([], []) == ([], [])


@pytest.mark.parametrize("count", [2, 4, 5 + 1 + 16 + 1])
def test_blocks_of_another_length_than_was_said_are_not_cached(serve: Serve, count: int) -> None:
    """TensorRT-LLM may use other blocks than those that were configured (FlashMLA)."""
    engine = serve()
    request = Request(1, list(PROMPT), chunk=len(PROMPT))
    assert engine.scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    request.blocks = list(range(count))
    engine.scheduler.update_state_after_alloc(request, request.blocks)
    metadata = engine.scheduler.build_connector_meta(engine.output([request]))
    assert (metadata.stores, metadata.lost) == ({}, [])
    assert engine.counter("errors") == 1


# ---- outputs that are not understood -------------------------------------------------------------
def test_more_scheduled_tokens_than_blocks_are_told_and_counted(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    engine = serve()
    first = engine.add(Request(1, list(PROMPT)))
    output = engine.output

    def drifted(running: Any) -> Any:
        made = output(running)
        for data in made.new_requests:
            data.num_scheduled_tokens += 5 * BLOCK
        return made

    engine.output = drifted  # type: ignore[method-assign]
    with caplog.at_level(logging.WARNING):
        engine.run_until(lambda: first.state == "finished")
    engine.output = output  # type: ignore[method-assign]
    assert "the rest is not stored" in caplog.text
    assert engine.counter("errors") == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("new_tokens", [1, 2, 3]),
        ("new_block_ids", [31, 30, 29, 28, 27]),
        ("new_block_ids", [-1, -1, -1, -1, -1]),
        ("computed_position", None),
    ],
)
def test_a_request_that_is_not_what_it_was_is_not_cached_any_more(
    serve: Serve, field: str, value: Any
) -> None:
    engine = serve()
    first = engine.add(Request(1, list(PROMPT)))
    output = engine.output

    def drifted(running: Any) -> Any:
        made = output(running)
        for data in made.new_requests:
            setattr(data, field, value)
        return made

    engine.output = drifted  # type: ignore[method-assign]
    engine.run_until(lambda: first.state == "finished")
    engine.output = output  # type: ignore[method-assign]
    assert engine.counter("errors") == 1
    assert engine.counter("published") == 0
    engine.serve(Request(2, list(PROMPT)))
    assert engine.loaded[2] == 0
    engine.serve(Request(3, list(PROMPT)))  # the second was cached
    assert engine.loaded[3] == WHOLE


def test_an_output_that_is_not_understood_costs_its_requests_their_cache(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    engine = serve()
    first = engine.add(Request(1, list(PROMPT), max_new=9))
    engine.admit(first)
    engine.scheduler.update_state_after_alloc(first, list(first.blocks))
    for _ in range(2):
        metadata = engine.scheduler.build_connector_meta(SimpleNamespace())
        assert (metadata.stores, metadata.lost) == ({}, [])
    assert caplog.text.count("a step was not understood") == 1
    engine.run_until(lambda: first.state == "finished")
    assert engine.counter("published") == 0


def test_with_an_output_that_is_not_understood_no_load_is_certain(serve: Serve) -> None:
    engine = serve()
    engine.serve(Request(1, list(PROMPT)))
    second = engine.add(Request(2, list(PROMPT)))
    engine.admit(second)
    engine.scheduler.update_state_after_alloc(second, list(second.blocks))
    assert engine.scheduler.build_connector_meta(SimpleNamespace()).lost == ["2"]
    engine.is_over = True


HOOKS: list[tuple[str, str, tuple[Any, ...], Any]] = [
    ("scheduler", "get_num_new_matched_tokens", (Request(1, [1]), 0), (0, False)),
    ("scheduler", "update_state_after_alloc", (Request(1, [1]), []), None),
    ("scheduler", "request_finished", (Request(1, [1]), []), False),
    ("scheduler", "shutdown", (), None),
    ("worker", "start_load_kv", (None,), None),
    ("worker", "wait_for_save", (None,), None),
    ("worker", "get_finished", ([], []), ([], [])),
    ("worker", "_forward_done", (), None),
    ("worker", "shutdown", (), None),
]


@pytest.mark.parametrize(("side", "hook", "arguments", "fallback"), HOOKS)
def test_no_hook_raises(
    serve: Serve,
    monkeypatch: pytest.MonkeyPatch,
    side: str,
    hook: str,
    arguments: Any,
    fallback: Any,
) -> None:
    class Broken:
        counted = 0

        def count_error(self) -> None:
            self.counted += 1

        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(f"{name} is broken")

    engine, broken = serve(), Broken()
    with monkeypatch.context() as patch:
        target = engine.scheduler if side == "scheduler" else engine.workers[0]
        patch.setattr(target, f"_{'leader' if side == 'scheduler' else 'worker'}", broken)
        assert getattr(target, hook)(*arguments) == fallback
        assert broken.counted == 1
