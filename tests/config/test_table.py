# SPDX-License-Identifier: Apache-2.0
"""The table in the documentation, and the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvbm.config import load_settings, tunables
from kvbm.config.table import TABLE_BEGIN, TABLE_END, main, markdown_table, update_page
from kvbm.errors import ConfigError

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


@pytest.fixture
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for tunable in tunables():
        monkeypatch.delenv(tunable.variable, raising=False)


def run_module(*args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("DYN_")}
    return subprocess.run(
        [sys.executable, "-m", "kvbm.config", *args],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**clean, **environ},
        cwd=PAGE.parents[1],
    )


def test_the_page_has_the_table_of_this_version() -> None:
    page = PAGE.read_text(encoding="utf-8")
    table = page.partition(TABLE_BEGIN)[2].partition(TABLE_END)[0]
    assert table.strip() == markdown_table().strip(), (
        "run: python -m kvbm.config --update docs/configuration.md"
    )


def test_the_table_has_a_well_formed_row_for_each_tunable() -> None:
    rows = markdown_table().splitlines()[2:]
    assert len(rows) == len(tunables())
    for row, tunable in zip(rows, tunables(), strict=True):
        assert row.count("|") == 6
        for part in (tunable.variable, tunable.kind.allowed, tunable.status, tunable.description):
            assert part in row


def test_update_replaces_only_what_is_between_the_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{TABLE_BEGIN}old\n{TABLE_END}after\n", encoding="utf-8")
    update_page(page)
    once = page.read_text(encoding="utf-8")
    assert once == f"before\n{TABLE_BEGIN}\n{markdown_table()}\n{TABLE_END}after\n"
    update_page(page)
    assert page.read_text(encoding="utf-8") == once


def test_update_refuses_a_page_without_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="has no place for the table"):
        update_page(page)
    assert page.read_text(encoding="utf-8") == "nothing\n"


def test_the_module_prints_the_table() -> None:
    done = run_module()
    assert (done.returncode, done.stdout, done.stderr) == (0, markdown_table(), "")


def test_json_prints_the_settings_in_effect() -> None:
    done = run_module("--json", DYN_KVBM_CPU_CACHE_GB="2.5", DYN_KVBM_INSTANCE="a")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {
        **load_settings({}, {}).model_dump(mode="json"),
        "cpu_cache_gb": 2.5,
        "instance": "a",
    }


def test_json_with_a_bad_value_fails_with_its_message() -> None:
    done = run_module("--json", DYN_KVBM_METRICS_PORT="0")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("DYN_KVBM_METRICS_PORT='0' is not valid (allowed: ")


@pytest.mark.usefixtures("_no_variables")
def test_main_returns_the_exit_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text(TABLE_BEGIN + TABLE_END, encoding="utf-8")
    assert main([]) == 0
    assert main(["--update", str(page)]) == 0
    assert main(["--json"]) == 0
    page.write_text("", encoding="utf-8")
    assert main(["--update", str(page)]) == 1
    monkeypatch.setenv("DYN_KVBM_CPU_CACHE_GB", "x")
    capsys.readouterr()
    assert main(["--json"]) == 1
    assert "DYN_KVBM_CPU_CACHE_GB='x'" in capsys.readouterr().err
