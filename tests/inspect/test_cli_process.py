# SPDX-License-Identifier: Apache-2.0
"""``python -m kvbm.inspect`` as a process: a reader that stops early, and a missing library."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
COMMAND = [sys.executable, "-m", "kvbm.inspect"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def test_a_reader_that_stops_early_ends_it_quietly(snapshot_file: Path) -> None:
    words = [*COMMAND, "ops", str(snapshot_file), "--state", "free"]
    process = subprocess.Popen(
        words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert b"leader" in process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(30) == -signal.SIGPIPE


def test_a_missing_library_is_named_with_the_way_to_get_it(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("raise ImportError('no click')\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [*COMMAND, "list"], env={**ENVIRONMENT, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "needs click" in done.stderr
    assert "kvbm[inspect]" in done.stderr
    assert done.stderr.count("\n") == 1
