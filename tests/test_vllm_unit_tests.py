# SPDX-License-Identifier: Apache-2.0
"""The script that runs vLLM's own tests: where they come from, which run, what the page says."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scripts import vllm_unit_tests as script
from scripts.vllm_units import selection
from scripts.vllm_units.selection import CORE, FILES, NOT_OURS, UNIT, is_selected, why_not

PAGE = (Path(script.ROOT) / "docs" / "vllm-tests.md").read_text()


def source_tree(top: Path) -> Path:
    """What the script needs of a source tree of vLLM."""
    (top / UNIT).mkdir(parents=True)
    (top / FILES[0]).write_text("def test_nothing(): pass\n")
    return top


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the tests of version 1.2.3 go."""
    monkeypatch.setenv("KVBM_VLLM_UNITS", str(tmp_path / "cache"))
    monkeypatch.setattr(script, "installed_version", lambda: "1.2.3")
    return tmp_path / "cache" / "vllm-1.2.3"


def pip_that(unpacks: bool, packs: bool) -> Any:
    """A pip that fails, after having left what a real one leaves."""

    def run(command: list[str], env: dict[str, str], **_: Any) -> SimpleNamespace:
        assert "vllm==1.2.3" in command
        into = Path(env["TMPDIR"])
        tree = source_tree(into / "pip-download-x" / "vllm_abc") if unpacks or packs else into
        if packs:
            with tarfile.open(into / "vllm-1.2.3.tar.gz", "w:gz") as tar:
                tar.add(tree, "vllm-1.2.3")
            if not unpacks:
                subprocess.check_call(["rm", "-r", str(tree)])
        return SimpleNamespace(returncode=1, stdout="pip was not happy")

    return SimpleNamespace(run=run, PIPE=None, STDOUT=None)


@pytest.mark.parametrize(("unpacks", "packs"), [(True, False), (False, True)])
def test_the_tests_come_from_what_pip_unpacked_or_saved(
    folder: Path, monkeypatch: pytest.MonkeyPatch, unpacks: bool, packs: bool
) -> None:
    monkeypatch.setattr(script, "subprocess", pip_that(unpacks, packs))
    assert script.find_tests(None) == folder
    assert (folder / FILES[0]).exists()
    assert json.loads((folder / script.MODEL / "config.json").read_text()) == script.MODEL_CONFIG
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    monkeypatch.setattr(script, "download", None)  # not called a second time
    assert script.find_tests(None) == folder


def test_what_pip_said_is_shown_if_there_is_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "subprocess", pip_that(False, False))
    assert script.main([]) == 1
    assert "no source distribution of vLLM 1.2.3" in (said := capsys.readouterr().err)
    assert "pip was not happy" in said
    assert not folder.exists()


def test_a_checkout_is_taken_if_it_is_one(folder: Path, tmp_path: Path) -> None:
    assert script.find_tests(source_tree(tmp_path / "checkout")) == folder
    with pytest.raises(script.NoTests, match="no source tree of vLLM"):
        script.find_tests(tmp_path / "cache")


def test_the_command_has_the_files_that_are_there(folder: Path, tmp_path: Path) -> None:
    script.prepare(source_tree(tmp_path / "checkout"), folder)
    command = script.command_for(folder, ["-x"])
    assert command[0] == sys.executable
    assert [part for part in command if part.startswith("tests/")] == [FILES[0]]
    assert command[-1] == "-x"
    (folder / FILES[0]).unlink()
    with pytest.raises(script.NoTests, match="none of the files"):
        script.command_for(folder, [])


def test_of_the_core_only_tests_with_a_connector_are_run() -> None:
    assert is_selected(f"{UNIT}/test_error_propagation.py::test_anything")
    assert is_selected(f"{CORE}/test_scheduler.py::test_kv_connector_basic[True]")
    assert not is_selected(f"{CORE}/test_scheduler.py::test_add_requests")


@pytest.mark.parametrize(
    ("node_id", "skipped"),
    [
        (f"{UNIT}/test_remote_prefill_lifecycle.py::test_basic_lifecycle", True),
        (f"{UNIT}/test_remote_prefill_lifecycle.py::test_interleaved_lifecycle", False),
        (f"{UNIT}/test_remote_decode_lifecycle.py::test_basic_lifecycle", False),
        (f"{CORE}/test_async_scheduler.py::test_kv_pressure_preempt_mid_handoff[kv_both-True]", 0),
        (f"{CORE}/test_async_scheduler.py::test_kv_pressure_preempt_mid_handoff[kv_producer-1]", 1),
        (f"{CORE}/test_prefix_caching.py::test_hisparse_async_admission[6-True]", True),
    ],
)
def test_only_what_is_listed_is_skipped(node_id: str, skipped: bool) -> None:
    assert (why_not(node_id) is not None) == bool(skipped)


@pytest.mark.parametrize("reason", sorted({reason for _, reason in NOT_OURS}))
def test_every_reason_is_on_the_page(reason: str) -> None:
    assert f"| {reason} |" in PAGE


@pytest.mark.parametrize("path", FILES)
def test_every_file_is_on_the_page(path: str) -> None:
    assert Path(path).name in PAGE
    assert selection.FILES.count(path) == 1
