# SPDX-License-Identifier: Apache-2.0
"""A guarded method does not raise; a surprise is counted, and told once."""

from __future__ import annotations

import logging

import pytest

from kvbm.guard import guarded


def test_the_first_error_is_logged_and_each_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    class Counting:
        errors = 0

        def count_error(self) -> None:
            self.errors += 1

        @guarded(lambda: "instead")
        def hook(self) -> str:
            raise KeyError("surprise")

    one = Counting()
    with caplog.at_level(logging.ERROR):
        assert [one.hook(), one.hook()] == ["instead", "instead"]
    assert one.errors == 2
    assert len(caplog.records) == 1
    assert "hook failed" in caplog.text
    assert "surprise" in caplog.text
