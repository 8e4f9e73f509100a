# SPDX-License-Identifier: Apache-2.0
"""The demo as a user runs it, with fewer requests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.demo.__main__ import COULD_NOT_RUN, PASSED, main
from tests.e2e.lab import Lab

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def test_the_demo_shows_equal_outputs_and_reused_tokens(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "demo.json"
    options = ["--turns", "2", "--models", str(tmp_path), "--json", str(file)]
    assert main(options) == PASSED, capsys.readouterr().out
    printed = capsys.readouterr().out
    assert "outputs equal: yes" in printed
    assert "reused from host" in printed
    figures = json.loads(file.read_text())
    assert figures["outputs_equal"]
    assert figures["passed"]
    assert figures["without"]["tier_tokens"]["host"] == 0
    assert figures["with_kvbm"]["tier_tokens"]["host"] > 0
    assert figures["with_kvbm"]["computed_tokens"] < figures["without"]["computed_tokens"]


def test_the_demo_says_when_the_workload_is_too_small_to_show_anything(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--conversations", "1", "--models", str(tmp_path)]) == COULD_NOT_RUN
    assert "--conversations=1" in capsys.readouterr().out
