# SPDX-License-Identifier: Apache-2.0
"""The debug build, and what the stress tests have found, said at the end of the run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts import sanitize

ROOT = Path(__file__).resolve().parent.parent.parent
SUMMARY = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """Begin with an empty summary."""
    config.stash[SUMMARY] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the summary, if a stress test has run."""
    lines = terminalreporter.config.stash.get(SUMMARY, [])
    if lines:
        terminalreporter.section("stress")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture
def summary(request: pytest.FixtureRequest) -> list[str]:
    """Lines of the summary; a test appends what it has done and found."""
    return request.config.stash[SUMMARY]


@pytest.fixture(scope="session")
def scale() -> float:
    """How much longer than in `make test` everything runs: KVBM_STRESS_SECONDS over 8."""
    return float(os.environ.get("KVBM_STRESS_SECONDS", "8")) / 8


@pytest.fixture(scope="session")
def on_debug_build() -> Callable[..., dict[str, int]]:
    """Run a module's program with the build that has crash points; the summary that it prints."""
    environment = {**os.environ, "KVBM_DEBUG": "1"}
    build = [sys.executable, "setup.py", "-q", "build"]
    built = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    library = ROOT / "build" / "debug" / "lib"

    def run(module: str, *arguments: str) -> dict[str, int]:
        done = subprocess.run(
            [sys.executable, "-P", "-m", module, *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(library), str(ROOT)])},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        found: dict[str, int] = json.loads(done.stdout)
        return found

    return run


@pytest.fixture(scope="session")
def thread_build() -> Path:
    """All of kvbm/_fast with ThreadSanitizer."""
    return sanitize.build("thread")


@pytest.fixture(scope="session")
def address_build() -> Path:
    """All of kvbm/_fast with AddressSanitizer and UndefinedBehaviorSanitizer."""
    return sanitize.build("address")
