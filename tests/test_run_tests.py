# SPDX-License-Identifier: Apache-2.0
"""`make test` runs each test once, and fails if any part of it failed."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path
from typing import Any

import pytest
from _pytest.mark.expression import Expression

from scripts import run_tests

MARKS = ("gpu", "stress", "e2e", "slow")


class Marks(dict[str, bool]):
    """The marks of a test, as an expression asks for them."""

    def __call__(self, name: str, **_: str | int | bool | None) -> bool:
        return self[name]


def test_each_test_that_needs_no_gpu_is_in_one_of_the_parts() -> None:
    parts = [Expression.compile(text) for text in (run_tests.UNIT, run_tests.OTHERS)]
    for has in itertools.product((False, True), repeat=len(MARKS)):
        marks = dict(zip(MARKS, has, strict=True))
        found = sum(part.evaluate(Marks(marks)) for part in parts)
        assert found == (not marks["gpu"] and not marks["stress"]), marks


class Commands:
    """Stands for `subprocess`: says how each command ends, and keeps what was run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **statuses: int) -> None:
        self.statuses = statuses
        self.seen: list[str] = []
        self.prepared = False
        monkeypatch.setattr(run_tests.subprocess, "run", self.run)
        monkeypatch.setattr(run_tests.subprocess, "Popen", lambda command, **_: self)

    def wait(self) -> int:
        """End of the preparation."""
        self.prepared = True
        return 0

    def run(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        """End at once."""
        part = "smoke" if "--smoke" in command else "unit"
        if run_tests.OTHERS in command:
            part = "others"
            assert self.prepared
        self.seen.append(part)
        return subprocess.CompletedProcess(command, self.statuses.get(part, 0))


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the log of the preparation out of the checkout."""
    monkeypatch.setattr(run_tests, "ROOT", tmp_path)


@pytest.mark.parametrize("part", ["unit", "smoke", "others"])
def test_one_failed_part_fails_the_run_and_the_others_run_all_the_same(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = Commands(monkeypatch, **{part: 1})
    assert run_tests.main([]) == 1
    assert commands.seen == ["unit", "smoke", "others"]


def test_a_part_without_a_selected_test_is_no_failure_unless_both_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Commands(monkeypatch, unit=run_tests.NO_TESTS)
    assert run_tests.main(["-k", "something"]) == 0
    Commands(monkeypatch, unit=run_tests.NO_TESTS, others=run_tests.NO_TESTS)
    assert run_tests.main(["-k", "nothing"]) == run_tests.NO_TESTS


def test_all_is_prepared_although_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_tests.os, "nice", lambda by: 0)
    commands = Commands(monkeypatch, smoke=3)
    assert run_tests.main(["--prepare"]) == 3
    assert len(commands.seen) == len(run_tests.PREPARATION)
