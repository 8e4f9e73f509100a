# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of the block table run, on a table of a few thousand blocks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


SMALL = "not (processes and 8) and not top"
FILES = [
    "bench_blocks.py",
    "bench_events.py",
    "bench_inspect.py",
    "bench_match.py",
    "bench_restart.py",
]


@pytest.mark.parametrize("file", FILES)
def test_the_benchmark_runs_on_a_small_table(file: str) -> None:
    options = ["--benchmark-disable", "-p", "no:cacheprovider", "-k", SMALL]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", f"bench/{file}", *options],
        cwd=ROOT,
        env={**os.environ, "KVBM_BENCH_BLOCKS": "4000"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
