# SPDX-License-Identifier: Apache-2.0
"""Fixtures: small engines, proven idle and removed at the end of a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.small_engine import SmallEngine

MakeEngine = Callable[..., SmallEngine]


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    """Make engines that are proven idle and removed at the end."""
    made: list[SmallEngine] = []

    def make(*arguments: Any, **settings: Any) -> SmallEngine:
        made.append(SmallEngine(*arguments, **settings))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture
def engine(make_engine: MakeEngine) -> SmallEngine:
    """One engine with one rank and one group."""
    return make_engine()
