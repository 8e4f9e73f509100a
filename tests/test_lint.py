# SPDX-License-Identifier: Apache-2.0
"""The checkers that ``make lint`` runs find nothing."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from scripts import lint

NEEDED = ("ruff", "mypy", "cython_lint", "codespell_lib")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", lint.CHECKS)
def test_the_check_finds_nothing(name: str) -> None:
    status, output = lint.run(name)
    assert status == 0, output


def test_an_unknown_check_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert lint.main(["mypi"]) == 2
    assert "mypi" in capsys.readouterr().out


def test_a_check_that_finds_something_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-c", "print('found'); raise SystemExit(1)"]
    monkeypatch.setitem(lint.CHECKS, "ruff-check", lambda: command)
    assert lint.main(["ruff-check"]) == 1
    assert "ruff-check: FAILED\nfound" in capsys.readouterr().out
