# SPDX-License-Identifier: Apache-2.0
"""The run on an instrumented build imports that build, and a report cannot be missed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from scripts import sanitize


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that says where the runtimes are, and no other."""
    path = tmp_path / "cc"
    path.write_text('#!/bin/sh\necho "/lib/${1#*=}"\n')
    path.chmod(0o755)
    monkeypatch.setenv("CC", str(path))
    return path


@pytest.mark.parametrize("arguments", [[], ["memory"]])
def test_an_unknown_sanitizer_is_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert sanitize.main(arguments) == 2
    assert "thread|address" in capsys.readouterr().err


@pytest.mark.parametrize("kind", sanitize.RUNTIMES)
def test_the_instrumented_package_comes_before_the_checkout(
    kind: str, compiler: Path, tmp_path: Path
) -> None:
    found = sanitize.environment(kind, tmp_path / "lib", tmp_path / "reports")
    paths = found["PYTHONPATH"].split(os.pathsep)
    assert paths == [str(tmp_path / "lib"), str(sanitize.ROOT)]
    assert found["LD_PRELOAD"] == ":".join(f"/lib/{name}" for name in sanitize.RUNTIMES[kind])
    for name in ("TSAN_OPTIONS", "ASAN_OPTIONS", "UBSAN_OPTIONS"):
        assert f"log_path={tmp_path}/reports/report" in found[name].split(":")


def test_a_missing_runtime_is_named(compiler: Path) -> None:
    compiler.write_text('#!/bin/sh\necho "${1#*=}"\n')
    with pytest.raises(SystemExit, match=r"no libtsan\.so"):
        sanitize.runtime_libraries("thread")


@pytest.mark.parametrize(
    ("report", "test_status", "expected"), [(None, 0, 0), ("race", 0, 1), (None, 1, 1)]
)
def test_a_report_or_a_failed_test_is_a_failure(
    report: str | None,
    test_status: int,
    expected: int,
    compiler: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reports = tmp_path / "build" / "thread" / "reports"
    (tmp_path / "setup.py").touch()
    pytest_script = tmp_path / "pytest"
    write = "" if report is None else f"open(r'{reports / 'report.1'}', 'w').write({report!r});"
    pytest_script.write_text(f"{write}\nraise SystemExit({test_status})")
    monkeypatch.setattr(sanitize, "ROOT", tmp_path)
    monkeypatch.setattr(sanitize, "runtime_libraries", lambda kind: [])
    monkeypatch.setattr(sanitize, "pytest_script", lambda: pytest_script)
    assert sanitize.main(["thread"]) == expected
    assert (report or "") in capsys.readouterr().out
