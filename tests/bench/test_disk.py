# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.disk`` runs, with little to move, and leaves nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.disk import __main__ as command


def test_the_command_moves_blocks_and_reopens_a_slab(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "SHAPES", ((64, 1), (64, 4)))
    arguments = ["--folder", str(tmp_path), "--rounds", "2", "--mib", "4", "--no-fio"]
    assert command.main([*arguments, "--terabytes", "0.01"]) == 0
    rows = [
        line.split("|")[1:4] for line in capsys.readouterr().out.splitlines() if "KiB |" in line
    ]
    done = {(block.strip(), what.strip(), by.strip()) for block, what, by in rows}
    assert ("64 KiB", "read", "kvbm") in done
    assert list(tmp_path.iterdir()) == []


def test_all_blocks_of_a_full_slab_are_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "SHAPES", ())
    assert command.main(["--folder", str(tmp_path), "--terabytes", "0.02"]) == 0
    found = re.search(r"([\d,]+) slots of 2 MiB, ([\d,]+) blocks", capsys.readouterr().out)
    assert found is not None
    assert found[1] == found[2]
