# SPDX-License-Identifier: Apache-2.0
"""Fixtures: the sample instance of the inspector's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fast.instances import instance
from tests.inspect.samples import Sample, fill


@pytest.fixture
def sample() -> Iterator[Sample]:
    """The live sample; its segment is removed afterwards."""
    one = instance(host_slots=64, ranks=2)
    try:
        yield fill(one)
    finally:
        one.remove()
