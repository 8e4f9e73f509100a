# SPDX-License-Identifier: Apache-2.0
"""`top` in a terminal: it draws, a key ends it, and without a terminal it says so."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

from kvbm.inspect.top import fitted
from tests.inspect.conftest import Inspect
from tests.inspect.disk_samples import DiskSample
from tests.inspect.samples import Sample

ROOT = Path(__file__).resolve().parent.parent.parent
DEADLINE_S = 30.0


def test_a_terminal_shows_the_screen_until_q(sample: Sample) -> None:
    terminal, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    environment |= {"LINES": "40", "COLUMNS": "100"}
    process = subprocess.Popen(
        [sys.executable, "-m", "kvbm.inspect", "top", sample.name],
        env=environment,
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE,
    )
    os.close(theirs)
    shown = b""
    end = time.monotonic() + DEADLINE_S
    try:
        while b"continuations" not in shown and time.monotonic() < end:
            if select.select([terminal], [], [], 1)[0]:
                shown += os.read(terminal, 65536)
        os.write(terminal, b" q")
        _, problem = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    assert process.returncode == 0, problem
    for text in (sample.name, "operations in flight: 1", "worker 0.1", "23/64"):
        assert text.encode() in shown


def test_what_a_low_terminal_leaves_out_is_said() -> None:
    lines = [str(number) for number in range(10)]
    assert fitted(lines, 10) == lines
    assert fitted(lines, 4) == ["0", "1", "2", "... 7 more lines in a higher window"]
    assert fitted(lines, 1) == ["... 10 more lines in a higher window"]


def test_a_file_or_no_terminal_is_one_line(sample: Sample, snapshot_file: Path) -> None:
    command = [sys.executable, "-m", "kvbm.inspect", "top"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    done = subprocess.run(
        [*command, sample.name], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")  # nothing for a terminal in a pipe
    assert done.stderr == "kvbm.inspect: top needs a terminal; --json does not\n"


def test_a_terminal_that_nobody_knows_is_one_line(sample: Sample) -> None:
    terminal, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "no-such-terminal"}
    command = [sys.executable, "-m", "kvbm.inspect", "top", sample.name]
    try:
        done = subprocess.run(
            command, env=environment, stdout=theirs, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(theirs)
        os.close(terminal)
    assert done.returncode == 2
    assert done.stderr.startswith("kvbm.inspect: top needs a terminal: ")


def test_json_needs_no_terminal_and_is_a_line_a_picture(sample: Sample, inspect: Inspect) -> None:
    one = inspect("top", sample.name, "--json", "--seconds", 0).stdout.splitlines()
    several = inspect("top", sample.name, "--json", "--hertz", 30, "--seconds", 0.5)
    pictures = [json.loads(line) for line in (*one, *several.stdout.splitlines())]
    assert len(one) == 1
    assert len(pictures) > 2
    for picture in pictures:
        assert (picture["schema"], picture["command"]) == (1, "top")
        assert picture["instance"] == sample.name
        assert picture["pools"]["host"] == {"used": 23, "total": 64}


def test_json_has_the_disk_tier(disk: DiskSample, inspect: Inspect) -> None:
    found = json.loads(inspect("top", disk.name, "--json", "--seconds", 0).stdout)
    assert found["pools"]["disk"] == {"used": 18, "total": 32}
    assert found["disk"]["blocks"]["registered"] == 16


def test_a_snapshot_cannot_be_followed(snapshot_file: Path, inspect: Inspect) -> None:
    result = inspect("top", snapshot_file)
    assert result.exit_code == 2
    assert "is a file; top and serve follow a live instance" in result.stderr
