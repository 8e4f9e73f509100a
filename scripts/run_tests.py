# SPDX-License-Identifier: Apache-2.0
"""Run everything that needs no GPU: ``python scripts/run_tests.py [pytest arguments]``.

Three parts, one after the other: the unit tests, a few tests on the oldest vLLM, and all the others
on the newest. While the unit tests keep one core busy, what the others need and what takes minutes
is made on another: the environment with the oldest vLLM, then the instrumented builds. If that
fails, the part that needs it says so, since it makes what it finds missing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import setup_env

ROOT = setup_env.ROOT
SCRIPTS = ROOT / "scripts"
UNIT = "not gpu and not stress and not e2e and not slow"
OTHERS = "not gpu and not stress and (e2e or slow)"
NO_TESTS = 5  # pytest's exit status when nothing was selected
NICENESS = 10
PREPARATION = (
    ("vllm_versions.py", "--smoke", "--prepare"),
    ("sanitize.py", "thread", "--build"),
    ("sanitize.py", "address", "--build"),
)


def prepare() -> int:
    """Make what later parts need, at a low priority; return the exit status of the last failure."""
    os.nice(NICENESS)
    status = 0
    for script, *arguments in PREPARATION:
        done = subprocess.run([sys.executable, str(SCRIPTS / script), *arguments], cwd=ROOT)
        status = done.returncode or status
    return status


def pytest(selection: str, arguments: Sequence[str]) -> int:
    """Run the tests of a selection of marks; return the exit status."""
    command = [sys.executable, "-m", "pytest", "-q", *arguments, "-m", selection]
    return subprocess.run(command, cwd=ROOT).returncode


def main(arguments: Sequence[str]) -> int:
    """Run all three parts, whatever the others found; return 0 if all passed."""
    if list(arguments) == ["--prepare"]:
        return prepare()
    log = ROOT / "build" / "prepare.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as output:
        preparing = subprocess.Popen(
            [sys.executable, __file__, "--prepare"], stdout=output, stderr=output
        )
    try:
        unit = pytest(UNIT, arguments)
        smoke = subprocess.run([sys.executable, str(SCRIPTS / "vllm_versions.py"), "--smoke"])
    finally:
        preparing.wait()
    others = pytest(OTHERS, arguments)
    if {unit, others} == {NO_TESTS}:
        return NO_TESTS
    failed = {"unit tests": unit not in (0, NO_TESTS), "oldest vLLM": smoke.returncode != 0}
    for name in (name for name, is_so in failed.items() if is_so):
        print(f"run_tests.py: {name}: failed, see above", file=sys.stderr)
    return 1 if any(failed.values()) or others not in (0, NO_TESTS) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
