# SPDX-License-Identifier: Apache-2.0
"""A crash between any two stores to shared memory leaves nothing wrong, lost or held."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.mark.timeout(600)
def test_every_crash_point_is_recovered_from(
    on_debug_build: Callable[..., dict[str, int]], summary: list[str]
) -> None:
    found = on_debug_build("tests.stress.crash_points")
    summary.append(
        f"crash points: {found['crash_points']}, {found['on disk']} at a disk tier's table and "
        f"{found['in recovery']} of a recovery; after each: 0 violations, 0 blocks lost, "
        "0 holds left"
    )
    assert found["crash_points"] > 200
    assert found["on disk"] > 100
    assert found["in recovery"] > 20
