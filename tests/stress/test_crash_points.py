# SPDX-License-Identifier: Apache-2.0
"""A crash between any two stores to shared memory leaves nothing wrong, lost or held."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="session")
def debug_build() -> Path:
    """The package with crash points, built beside the ordinary one."""
    environment = {**os.environ, "KVBM_DEBUG": "1"}
    build = [sys.executable, "setup.py", "-q", "build"]
    done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return ROOT / "build" / "debug" / "lib"


@pytest.mark.timeout(600)
def test_every_crash_point_is_recovered_from(
    debug_build: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(debug_build), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "tests.stress.crash_points"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    points = json.loads(done.stdout)["crash_points"]
    with capsys.disabled():
        print(f"\ncrash points visited: {points}")
    assert points > 200
