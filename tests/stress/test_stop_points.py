# SPDX-License-Identifier: Apache-2.0
"""A process that is stopped between any two stores to shared memory stops nobody."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.mark.timeout(600)
def test_a_stopped_process_stops_nobody(
    on_debug_build: Callable[..., dict[str, int]], summary: list[str], scale: float
) -> None:
    every = 8 if scale <= 1 else 1
    found = on_debug_build("tests.stress.stop_points", "--every", str(every))
    summary.append(
        f"SIGSTOP: {found['stops']} points, and {found['in recovery']} of a recovery, "
        f"{found['in an equal store']} of a store of what others store; everything "
        f"went on meanwhile within {found['stores']} stores"
    )
    assert found["stops"] > 600 / every
    assert found["in recovery"] > 20
    assert found["in an equal store"] > 60
