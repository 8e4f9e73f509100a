# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the compiled core's tests: segments that are proven idle at the end of a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.fast.instances import Instance, instance
from tests.fast.probe import load_probe


@pytest.fixture
def make_instance() -> Iterator[Callable[..., Instance]]:
    """Make segments; each is proven to be in its `check` state when the test is over."""
    made: list[Instance] = []

    def make(*args: Any, **options: Any) -> Instance:
        made.append(instance(*args, **options))
        return made[-1]

    yield make
    try:
        for one in made:
            one.prove()
    finally:
        for one in made:
            one.remove()


@pytest.fixture(scope="session")
def probe() -> Any:
    """The functions of the compiled core that have no Python API, callable from Python."""
    return load_probe()
