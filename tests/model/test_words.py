# SPDX-License-Identifier: Apache-2.0
"""The block words, modelled a second time in Promela, hold in every interleaving too."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

WORDS = Path(__file__).with_name("words.pml")
MISSING = [name for name in ("spin", "gcc") if shutil.which(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


def verify(folder: Path, *flags: str, claim: bool = True) -> tuple[int, int]:
    """Errors and states that Spin finds; with the claim (I1 and I2), or with dead ends."""
    subprocess.run(["spin", *flags, "-a", str(WORDS)], cwd=folder, check=True, capture_output=True)
    build = ["gcc", "-O2", "-w", "-DMEMLIM=2048", "-o", "pan", "pan.c"]
    subprocess.run(build, cwd=folder, check=True, capture_output=True)
    run = ["./pan", "-m100000", "-a" if claim else "-noclaim"]
    done = subprocess.run(run, cwd=folder, capture_output=True, text=True, check=False)
    errors = re.search(r"errors: (\d+)", done.stdout)
    states = re.search(r"(\d+) states, stored", done.stdout)
    assert errors is not None, done.stdout + done.stderr
    assert states is not None, done.stdout
    assert "error: max search depth" not in done.stdout
    assert "out of memory" not in done.stdout
    return int(errors.group(1)), int(states.group(1))


@pytest.mark.parametrize("flags", [(), ("-DREADER",), ("-DDEATHS=2",)], ids=" ".join)
def test_the_words_hold(tmp_path: Path, flags: tuple[str, ...]) -> None:
    errors, states = verify(tmp_path, *flags)
    assert errors == 0
    assert states > 100_000


def test_every_run_ends_with_nothing_held(tmp_path: Path) -> None:
    errors, _ = verify(tmp_path, claim=False)
    assert errors == 0


@pytest.mark.parametrize("rule", ["COUNT_LATE", "UNCOUNT_EARLY", "LOOK_EARLY", "RECOUNT_INSIDE"])
def test_a_broken_rule_is_noticed(tmp_path: Path, rule: str) -> None:
    errors, _ = verify(tmp_path, f"-D{rule}")
    assert errors == 1
