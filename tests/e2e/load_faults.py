# SPDX-License-Identifier: Apache-2.0
"""Faults in the middle of a load: functions for `Call` phases, in the engine's process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from kvbm.transfer.arena_layout import ArenaLayout
from tests.e2e.lives import Driver, Tokens, driven


class InjectedError(Exception):
    """An error that a test put there."""


def arena_of(driver: Driver) -> tuple[Any, ArenaLayout]:
    """Mapped arena and its layout."""
    worker = driver.worker
    slots = driver.side.segment.shape.host_slots
    return worker.arena._map, ArenaLayout(slots, worker.geometries[0].chunk_bytes)


@contextmanager
def damaged_bytes(driver: Driver) -> Iterator[None]:
    """One byte of each block in the arena is another one."""
    memory, layout = arena_of(driver)
    for slot in range(layout.slots):
        memory[layout.offset(slot, 0)] ^= 0xFF
    yield


@contextmanager
def damaged_slot_headers(driver: Driver) -> Iterator[None]:
    """The slot headers are gone, as if somebody had wiped the table."""
    memory, layout = arena_of(driver)
    for slot in range(layout.slots):
        start = layout.header_offset(slot)
        memory[start : start + 64] = bytes(64)
    yield


@contextmanager
def replaced(target: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute has another value inside."""
    before = getattr(target, name)
    setattr(target, name, value)
    try:
        yield
    finally:
        setattr(target, name, before)


def fails(*_: Any, **__: Any) -> Any:
    """Raise, whatever is asked."""
    raise InjectedError


def no_operation(driver: Driver) -> AbstractContextManager[None]:
    """No operation is free for the load."""
    return replaced(driver.side.leader, "_submit_load", lambda *_: False)


def submitting_raises(driver: Driver) -> AbstractContextManager[None]:
    """Submitting the load raises."""
    return replaced(driver.side.leader, "_submit_load", fails)


def match_raises(driver: Driver) -> AbstractContextManager[None]:
    """`get_num_new_matched_tokens` raises."""
    return replaced(driver.side.leader, "match", fails)


def load_raises(driver: Driver) -> AbstractContextManager[None]:
    """`update_state_after_alloc` raises."""
    return replaced(driver.side.leader, "load", fails)


def running_raises(driver: Driver) -> AbstractContextManager[None]:
    """The work of `build_connector_meta` on each request raises."""
    return replaced(driver.side, "_runs", fails)


def finishing_raises(driver: Driver) -> AbstractContextManager[None]:
    """`request_finished` raises."""
    return replaced(driver.side.leader, "finish", fails)


def collecting_raises(driver: Driver) -> AbstractContextManager[None]:
    """`update_connector_output` raises while a load is noted as ended."""
    return replaced(driver.side.leader, "_load_ended", fails)


@contextmanager
def reporting_raises(driver: Driver) -> Iterator[None]:
    """`get_finished` raises a few times on the worker."""
    worker = driver.worker
    real, left = worker.ended_loads, [3]

    def ended_loads() -> Any:
        if left[0] > 0:
            left[0] -= 1
            raise InjectedError
        return real()

    with replaced(worker, "ended_loads", ended_loads):
        yield


def step_raises(driver: Driver) -> AbstractContextManager[None]:
    """`build_connector_meta` does not understand the steps."""
    return replaced(driver.side, "_note_step", fails)


def stopping_raises(driver: Driver) -> AbstractContextManager[None]:
    """`handle_preemptions` and `bind_connector_metadata` cannot stop copies on the worker."""
    return replaced(driver.worker, "stop_copies", fails)


def filling_raises(driver: Driver) -> AbstractContextManager[None]:
    """`wait_for_save` raises on the worker."""
    return replaced(driver.worker, "filled", fails)


@contextmanager
def statistics_raise(driver: Driver) -> Iterator[None]:
    """`get_kv_connector_stats` raises, and `has_pending_block_frees`."""
    with (
        replaced(driver.side, "stats", fails),
        replaced(driver.worker_side, "stats", fails),
        replaced(type(driver.side), "holds_device_blocks", property(fails)),
    ):
        yield


FAULTS: dict[str, Callable[[Driver], AbstractContextManager[None]]] = {
    f.__name__: f
    for f in (
        damaged_bytes,
        damaged_slot_headers,
        no_operation,
        submitting_raises,
        match_raises,
        load_raises,
        running_raises,
        finishing_raises,
        collecting_raises,
        reporting_raises,
        step_raises,
        stopping_raises,
        filling_raises,
        statistics_raise,
    )
}


def worker_is_here(llm: Any) -> bool:
    """Whether the worker is in the engine's process, where faults can be put into it."""
    return Driver(llm).worker is not None


def cached(driver: Driver, prompt: Tokens) -> None:
    """Have the prompt in the host tier and not on the device; failures before are forgotten."""
    driver.side.leader.failures.succeeded()
    driver.forget(connector=True)
    driver.add("first", prompt)
    driver.finish()
    driver.forget(connector=False)


@driven
def load_with_fault(driver: Driver, prompt: Tokens, other: Tokens, fault: str) -> None:
    """A request whose blocks are in the host tier meets a fault, beside another request."""
    cached(driver, prompt)
    failed = driver.counter("loads_failed")
    with FAULTS[fault](driver):
        driver.add("loaded", prompt)
        driver.add("other", other)
        driver.finish()
    driver.drain()
    driver.lives.facts["loads failed"] = driver.counter("loads_failed") - failed
    driver.forget(connector=False)
    driver.add("again", prompt)
    driver.finish()


@driven
def cancelled_load(driver: Driver, prompt: Tokens) -> None:
    """The operations of a load are cancelled before they begin."""
    cached(driver, prompt)
    cancelled = driver.counter("loads_cancelled")
    with driver.copies_held():
        driver.add("loaded", prompt)
        driver.step_until(lambda: driver.status("loaded") == "WAITING_FOR_REMOTE_KVS")
        for handle in driver.sequence("loaded").loads:
            driver.side.leader.table.cancel(handle)
    driver.finish()
    driver.lives.facts["loads cancelled"] = driver.counter("loads_cancelled") - cancelled


@driven
def copy_thread_ends(driver: Driver, prompt: Tokens, others: list[Tokens]) -> None:
    """The copy thread ends while a load waits; the engine goes on without its cache."""
    cached(driver, prompt)
    with driver.copies_held():
        driver.add("loaded", prompt)
        driver.step_until(lambda: driver.status("loaded") == "WAITING_FOR_REMOTE_KVS")
        driver.worker.loop.stop()
        driver.worker._copies.join()
    for number, other in enumerate(others):
        driver.add(f"other {number}", other)
        driver.finish()
        driver.drain()
        assert driver.llm.reset_prefix_cache(reset_connector=False)
    driver.lives.facts["copying"] = driver.worker.copying
