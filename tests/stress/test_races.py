# SPDX-License-Identifier: Apache-2.0
"""Threads over one mapping: no race, no bad access, no undefined behaviour, no wrong block."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from scripts import sanitize
from tests.stress import races

TURNS = 1500
LIVES = 4
BACKENDS = ("disk_backend", "cuda_backend", "cuda_staging", "memory")


def watch(kind: str, library: Path, reports: Path, turns: int, lives: int) -> sanitize.Outcome:
    """Run the threads with an instrumented package."""
    program = [sys.executable, "-m", races.__name__, "--turns", str(turns), "--lives", str(lives)]
    return sanitize.watch(kind, library, reports, program, capture=True)


def done(outcome: sanitize.Outcome) -> Any:
    """What the threads have done; fails if the run failed or the sanitizer said anything."""
    assert outcome.status == 0, outcome.output
    assert not outcome.reports, "\n".join(outcome.reports)
    return json.loads(outcome.output.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["thread", "address"])
def test_participants_over_one_mapping_are_reported_for_nothing(
    kind: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    summary: list[str],
    scale: float,
) -> None:
    library = request.getfixturevalue(f"{kind}_build")
    turns = int(TURNS * scale)
    did = done(watch(kind, library, tmp_path / "reports", turns, LIVES))
    assert did["wrong"] == 0
    assert did["turns"] == races.LEADERS * LIVES * (turns // 4) * 4
    assert did["deaths"] == races.LEADERS * (LIVES - 1) * 2
    assert min(did[name] for name in ("read", "stored", "loaded", "abandoned", "restored")) > 0
    summary.append(
        f"{kind} sanitizer: {did['turns']} operations of {races.LEADERS} leaders over one mapping, "
        f"{did['read']} blocks read, {did['deaths']} deaths, 0 reports, {did['wrong']} wrong blocks"
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_threads_of_the_backends_are_reported_for_nothing(
    thread_build: Path, tmp_path: Path, summary: list[str]
) -> None:
    """Copy threads of the disk and of a simulated device, and the engine's beside them."""
    files = [f"tests/fast/test_{name}.py" for name in BACKENDS]
    words = [sys.executable, str(sanitize.pytest_script()), "-p", "no:cacheprovider", "-q"]
    words += ["-o", "timeout=600", "-m", "not gpu and not slow", *files]
    outcome = sanitize.watch("thread", thread_build, tmp_path / "reports", words, capture=True)
    assert not outcome.reports, "\n".join(outcome.reports)
    assert outcome.status == 0, outcome.output
    summary.append(f"thread sanitizer: tests of {', '.join(BACKENDS)}, 0 reports")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("module", "notices"), [("blocks", "_races"), ("operations", "worker_loop.pyx")]
)
def test_a_module_that_releases_nothing_is_reported(
    module: str, notices: str, thread_build: Path, tmp_path: Path
) -> None:
    library = tmp_path / "lib"
    shutil.copytree(thread_build, library)
    file = f"{module}{sysconfig.get_config_var('EXT_SUFFIX')}"
    compiler = os.environ.get("CC", "gcc").split()
    flags = ["-shared", "-fPIC", "-O1", "-std=gnu11", *sanitize.FLAGS["thread"].split()]
    source = thread_build.parent / "cython" / "kvbm" / "_fast" / f"{module}.c"
    include = [f"-I{sanitize.ROOT / 'kvbm' / '_fast'}", f"-I{sysconfig.get_path('include')}"]
    output = ["-o", str(library / "kvbm" / "_fast" / file)]
    command = [*compiler, *flags, "-DKVBM_PLANT_RACE", *include, str(source), *output]
    subprocess.run(command, check=True, cwd=sanitize.ROOT)
    outcome = watch("thread", library, tmp_path / "reports", TURNS, 2)
    assert outcome.status == 0, outcome.output
    found = "\n".join(outcome.reports)
    assert "data race" in found
    assert notices in found
