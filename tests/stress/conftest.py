# SPDX-License-Identifier: Apache-2.0
"""What the stress tests have found, said in one place at the end of the run."""

from __future__ import annotations

import os

import pytest

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
