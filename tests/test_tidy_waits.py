# SPDX-License-Identifier: Apache-2.0
"""A wait without a deadline is found, and none of the listed ones is gone."""

from __future__ import annotations

import pytest

from scripts import tidy
from scripts.tidy_waits import ENDED, cython_waits, python_waits, unbounded_waits

LOOP = "while not ready():\n    time.slee" + "p(0.1)\n"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("thread.join()", "thread.join"),
        ("self.done.wait()", "self.done.wait"),
        ("queue.get()", "queue.get"),
        ("lock.acquire()", "lock.acquire"),
        (LOOP, "time.slee" + "p"),
        ("while True:\n" + LOOP.replace("\n", "\n    ").replace("while", "    while", 1), None),
    ],
)
def test_a_wait_that_nothing_bounds_is_found(text: str, what: str | None) -> None:
    found = {name for _, name in python_waits(text)}
    assert found == {what or "time.slee" + "p"}


@pytest.mark.parametrize(
    "text",
    [
        "', '.join(names)",
        "thread.join(timeout=1)",
        "settings.get('name')",
        "while not ready() and time.monotonic() < deadline:\n    time.slee" + "p(0.1)\n",
        "while True:\n    if self._stopping():\n        break\n    time.slee" + "p(0.1)\n",
    ],
)
def test_what_has_a_bound_is_none(text: str) -> None:
    assert list(python_waits(text)) == []


def test_blocking_calls_of_the_core_are_found_but_not_their_definitions() -> None:
    assert list(cython_waits("    usleep(20)\n")) == [(1, "usleep")]
    assert list(cython_waits("        pthread_cond_wait(&self.work, &self.lock)\n")) != []
    assert list(cython_waits("cdef void doorbell_wait(kv_view *view) noexcept nogil:\n")) == []
    assert list(unbounded_waits("kvbm/_fast/new.pyx", "    usleep(20)\n")) == [
        "kvbm/_fast/new.pyx:1: usleep waits without a deadline"
    ]


def test_each_wait_that_is_listed_is_there() -> None:
    sources = {source.path: source.text for source in tidy.tracked_sources()}
    for path, what in ENDED:
        waits = python_waits if path.endswith(".py") else cython_waits
        assert what in {name for _, name in waits(sources[path])}, (path, what)
