# SPDX-License-Identifier: Apache-2.0
"""The pause after failures in a row."""

from kvbm.leader.failure_pause import FailurePause


def test_the_pause_doubles_up_to_its_limit_and_a_success_ends_the_row() -> None:
    now = 100.0
    pause = FailurePause(2, 3.0, 10.0, lambda: now)
    assert pause.failed() is None
    assert pause.is_over()
    assert [pause.failed() for _ in range(4)] == [3.0, 6.0, 10.0, 10.0]
    assert not pause.is_over()
    now += 10.0
    assert pause.is_over()
    assert pause.succeeded()
    assert pause.in_a_row == 0
    assert not pause.succeeded()
    assert pause.failed() is None
