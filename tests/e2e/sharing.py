# SPDX-License-Identifier: Apache-2.0
"""What one of two engines does while the other one is watched: functions for `Call` phases.

They run in the engine's process (see `tests.e2e.lives`) and leave it, between two phases, in states
that would pass in milliseconds otherwise: "stores, and nothing is copied yet", "waits".
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvbm._fast.participants import participants
from tests.e2e.lives import READY_S, Driver, Tokens
from tests.leaks import wait_until

_left: list[Any] = []
"""Drivers and held copies between two phases."""

REQUESTS_MAX = 200


class Gate:
    """A place where engines wait until the test lets them through.

    Parameters
    ----------
    path : Path
        Of a file that is made for it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def open(self) -> None:
        """Let through who waits, and who comes later."""
        fcntl.flock(self._file, fcntl.LOCK_UN)

    def close(self) -> None:
        os.close(self._file)


@contextmanager
def gates(folder: Path, count: int) -> Iterator[list[Gate]]:
    """So many gates, all of them closed."""
    made = [Gate(folder / f"gate-{number}") for number in range(count)]
    yield made
    for gate in made:
        gate.close()


def ready(llm: Any) -> None:
    """A phase that ends once the engine takes requests and has slots for their blocks."""
    Driver(llm)


def finish_stores(llm: Any) -> None:
    """Go on until no store is under way: the end of an engine takes back what is.

    A copy thread may get no processor for half a second where others want it, and blocks that are
    copied wait for the parent that another engine is filling.
    """
    driver = Driver(llm)
    driver.drain()
    leader = driver.side.leader

    def stored() -> bool:
        leader.collect()  # as each step of an engine that has requests does
        return not leader._storing and not leader._uncollected

    assert wait_until(stored, READY_S)


def wait_at(_: Any, gate: Path) -> None:
    """Wait until a gate is opened."""
    with gate.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)


def begin_to_store(llm: Any, prompts: Sequence[Tokens]) -> int:
    """Compute prompts while no copy begins; how many blocks are then reserved."""
    driver = Driver(llm)
    held = driver.copies_held()
    held.__enter__()
    _left[:] = [driver, held]
    for number, prompt in enumerate(prompts):
        driver.add(f"stored {number}", prompt)
    # Not with the first token: the worker may not have opened its arena by then.
    names = [f"stored {number}" for number in range(len(prompts))]
    driver.step_until(lambda: all(getattr(driver.sequence(n), "stores", ()) for n in names))
    return len(driver.side.leader.table.held())


def copy_at_last(_: Any) -> dict[str, Tokens]:
    """Go on with `begin_to_store`; the outputs."""
    driver, held = _left
    held.__exit__(None, None, None)
    driver.finish()
    driver.drain()
    return dict(driver.lives.outputs)


def ask(llm: Any, prompt: Tokens) -> None:
    """Send a prompt that another engine stores just now, until it waits."""
    driver = Driver(llm)
    _left[:] = [driver]
    driver.side.leader.prefill.tokens_per_sec = 1.0  # it waits as long as anybody may
    driver.add("asks", prompt)
    driver.step_until(lambda: getattr(driver.sequence("asks"), "waits_since", None) is not None)


def receive(_: Any) -> tuple[Tokens, int]:
    """Go on with `ask`: the output, and the prompt's tokens that came from the cache."""
    (driver,) = _left
    driver.finish()
    driver.drain()
    driver.side.leader.prefill.tokens_per_sec = 0.0
    return driver.lives.outputs["asks"], driver.cached["asks"]


def serve_until_recovered(llm: Any, prompt: Tokens) -> int:
    """Serve one request after the other until nobody dead is left in the segment; how many."""
    driver = Driver(llm)
    segment = driver.side.segment
    for number in range(REQUESTS_MAX):
        if all(line.alive for line in participants(segment)):
            return number
        driver.add(f"meanwhile {number}", prompt, max_tokens=4)
        driver.finish()
    raise AssertionError(f"not recovered after {REQUESTS_MAX} requests")
