# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.segment`` times both tables, with few blocks, and leaves nothing."""

from __future__ import annotations

import pytest

from bench.segment import __main__ as command
from bench.segment.work import STEPS, TABLES


def test_the_command_times_each_step_of_both_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--blocks", "6000", "--rounds", "4", "--processes", "2"]) == 0
    rows = [
        line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if "| 2 |" in line
    ]
    assert {(row[1].strip(), row[2].strip()) for row in rows} == {
        (step, table) for step in STEPS for table in TABLES
    }
    assert all(float(cell.replace(",", "")) > 0 for row in rows for cell in row[3:])


def test_more_rounds_than_the_older_half_of_the_blocks_holds_are_refused() -> None:
    with pytest.raises(SystemExit):
        command.main(["--blocks", "6000", "--rounds", "1000"])
