# SPDX-License-Identifier: Apache-2.0
"""Fixtures of all tests: nothing may be left behind, and no test may hang."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Iterator

import pytest

from tests.engines import engine, make_engine  # noqa: F401 (fixtures for all tests)
from tests.leaks import Held, leaked, snapshot

STDERR = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    """Keep the real standard error: while a test runs, pytest's capture stands in its place."""
    config.stash[STDERR] = os.dup(2)


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the watchdog and give the descriptor back."""
    faulthandler.cancel_dump_traceback_later()
    os.close(config.stash[STDERR])


@pytest.fixture(scope="session")
def held() -> Held:
    """Where a fixture that outlives one test registers the objects and threads it keeps."""
    return Held()


@pytest.fixture(scope="session", autouse=True)
def nothing_left_by_the_session() -> Iterator[None]:
    """Fail if something of kvbm is left when all fixtures are gone, registered or not."""
    before = snapshot()
    yield
    left = leaked(before, Held())
    assert not left, "left behind by the session:\n" + "\n".join(left)


@pytest.fixture(autouse=True)
def nothing_left_by_the_test(held: Held) -> Iterator[None]:
    """Fail if the test leaves a name in /dev/shm, a thread, a descriptor or a mapping."""
    before = snapshot()
    yield
    left = leaked(before, held)
    assert not left, "left behind by the test:\n" + "\n".join(left)


@pytest.fixture(autouse=True)
def watchdog(request: pytest.FixtureRequest) -> Iterator[None]:
    """End the whole run, with the stacks of all threads, if a test cannot be interrupted.

    pytest-timeout interrupts a test that takes too long by a signal, which a thread that is stuck
    without the interpreter never sees.
    """
    marker = request.node.get_closest_marker("timeout")
    if marker is not None:
        limit_s = float(marker.args[0] if marker.args else marker.kwargs["timeout"])
    else:
        limit_s = float(request.config.getini("timeout") or 0)
    if limit_s > 0:
        stderr = request.config.stash[STDERR]
        faulthandler.dump_traceback_later(2 * limit_s + 60, exit=True, file=stderr)
    yield
    faulthandler.cancel_dump_traceback_later()
