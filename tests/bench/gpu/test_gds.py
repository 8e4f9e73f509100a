# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.gpu.gds`` says what each backend can do here, and where it stops."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch

from bench.gpu import gds
from kvbm.errors import ConfigError
from kvbm.transfer.nixl import nixl_library


def test_comments_in_a_configuration_are_left_out() -> None:
    text = '{"properties": {"a": "a // b", // why\n "allow_compat_mode": true,}}'
    found = {"properties": {"a": "a // b", "allow_compat_mode": True}}
    assert gds.json_with_comments(text) == found


def test_the_facts_name_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "cufile.json"
    config.write_text('{"properties": {"allow_compat_mode": false, "other": 1}} // end')
    monkeypatch.setenv("CUFILE_ENV_PATH_JSON", str(config))
    found = gds.facts(tmp_path)
    assert found["configuration"].endswith('{"allow_compat_mode": false}')
    assert found[str(tmp_path)]
    config.write_text("{")
    assert "cannot be read" in gds.facts(tmp_path)["configuration"]


def test_other_bytes_are_noticed() -> None:
    with pytest.raises(RuntimeError, match="1 of 4 bytes"):
        gds.compared(torch.zeros(4), torch.tensor([0.0, 0.0, 1.0, 0.0]))


def test_a_step_that_fails_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(gds.Failed, match="this"), gds.step("this"):
        raise ValueError("reason")
    assert capsys.readouterr().out == "this: FAILED, ValueError: reason\n"


def test_posix_moves_blocks_between_a_file_and_host_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        nixl_library()
    except ConfigError:
        pytest.skip("NIXL is not installed (pip install --no-deps nixl-cu13)")
    where = ["--folder", str(tmp_path), "--device", "cpu", "--mib", "4"]
    assert gds.main([*where, "--trial", "POSIX"]) == 0
    said = capsys.readouterr().out
    assert "file -> DRAM, compared: ok" in said
    assert "DRAM -> file, compared: ok" in said
    assert list(tmp_path.iterdir()) == []


def test_each_backend_is_tried_in_a_process_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "echo")
    assert gds.main(["--folder", str(tmp_path), "--device", "cpu"]) == 0
    said = capsys.readouterr().out.splitlines()
    tried = [line.split()[3] for line in said if line.startswith("  -m bench.gpu.gds --trial")]
    assert tried == ["GDS_MT", "GDS_MT", "GDS", "GDS", "POSIX"]
