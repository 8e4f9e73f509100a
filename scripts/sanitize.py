# SPDX-License-Identifier: Apache-2.0
"""Run tests on an instrumented build: ``python scripts/sanitize.py thread|address [pytest ...]``.

Builds all of ``kvbm/_fast`` with KVBM_SANITIZE into ``build/<kind>/lib`` (a function that one
module takes from another runs from the other's library, so that all must be instrumented), puts
that package before the checkout, loads the sanitizer's runtime into an ordinary CPython and runs
pytest; with ``--build`` it builds and ends. Reports go to files, since pytest captures what a test
prints; any report is a failure.

ThreadSanitizer sees races between threads over one mapping. It cannot see other processes, nor two
mappings of one segment: tests/stress/races.py is the program that gives it something to see.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

import setup_env

ROOT = setup_env.ROOT
RUNTIMES = {"thread": ("libtsan.so",), "address": ("libasan.so", "libubsan.so")}
FLAGS = {"thread": "-fsanitize=thread -g", "address": "-fsanitize=address,undefined -g"}
DEFAULT_TESTS = ["tests/fast", "-m", "not gpu and not e2e"]


class Outcome(NamedTuple):
    """How a command ended on an instrumented build, and what the sanitizer said of each process."""

    status: int
    output: str
    reports: list[str]


def runtime_libraries(kind: str) -> list[str]:
    """Return the paths of the runtime libraries that the compiler links for ``kind``."""
    compiler = os.environ.get("CC", "gcc").split(" ")[0]
    found = []
    for name in RUNTIMES[kind]:
        command = [compiler, f"-print-file-name={name}"]
        path = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        if not Path(path).is_absolute():
            sys.exit(f"sanitize.py: {compiler} has no {name}: install the sanitizer's runtime")
        found.append(path)
    return found


def environment(kind: str, library: Path, reports: Path) -> dict[str, str]:
    """Return the environment in which the instrumented package is imported and watched."""
    common = f"log_path={reports / 'report'}"
    return {
        **os.environ,
        "LD_PRELOAD": ":".join(runtime_libraries(kind)),
        # Before the checkout, which is needed for the tests' own modules; and no script or `-c`
        # may put the current folder before both.
        "PYTHONPATH": os.pathsep.join([str(library), str(ROOT)]),
        "PYTHONSAFEPATH": "1",
        "PYTHONMALLOC": "malloc",
        "KVBM_CFLAGS": FLAGS[kind],  # of the tests' own extension modules
        "TSAN_OPTIONS": f"{common}:ignore_noninstrumented_modules=1:exitcode=0",
        "ASAN_OPTIONS": f"{common}:detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": f"{common}:print_stacktrace=1",
    }


def fixed_addresses() -> list[str]:
    """Return the command prefix that turns address randomisation off, where that is allowed.

    ThreadSanitizer's shadow memory needs fixed places, which a kernel that randomises more bits
    than it expects may already have given away.
    """
    prefix = ["setarch", platform.machine(), "-R"]
    if shutil.which(prefix[0]) is None:
        return []
    allowed = subprocess.run([*prefix, "true"], capture_output=True).returncode == 0
    return prefix if allowed else []


def pytest_script() -> Path:
    """Return pytest as a script: run as a module it would put the checkout first."""
    return Path(sys.executable).parent / "pytest"


def build(kind: str) -> Path:
    """Build the instrumented package, what has changed of it; return where it is."""
    with setup_env.locked(ROOT / "build" / kind):
        subprocess.run(
            [sys.executable, "setup.py", "-q", "build"],
            cwd=ROOT,
            env={**os.environ, "KVBM_SANITIZE": kind},
            check=True,
        )
    return ROOT / "build" / kind / "lib"


def watch(
    kind: str, library: Path, reports: Path, command: Sequence[str], capture: bool = False
) -> Outcome:
    """Run a command with an instrumented package; ``reports`` is emptied first."""
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir(parents=True)
    done = subprocess.run(
        [*fixed_addresses(), *command],
        cwd=ROOT,
        env=environment(kind, library, reports),
        stdout=subprocess.PIPE if capture else None,
        stderr=subprocess.STDOUT if capture else None,
        text=True,
    )
    found = [path.read_text(errors="replace") for path in sorted(reports.iterdir())]
    return Outcome(done.returncode, done.stdout or "", found)


def main(arguments: list[str]) -> int:
    """Build, run the tests, print the reports; return 1 if a test failed or a report exists."""
    if not arguments or arguments[0] not in RUNTIMES:
        usage = f"usage: sanitize.py {'|'.join(RUNTIMES)} [--build | pytest arguments]"
        print(usage, file=sys.stderr)
        return 2
    if sys.version_info < (3, 11):
        print("sanitize.py: needs Python 3.11 or newer (PYTHONSAFEPATH)", file=sys.stderr)
        return 2
    kind, tests = arguments[0], arguments[1:] or DEFAULT_TESTS
    library = build(kind)
    if tests == ["--build"]:
        return 0
    # The watchdogs' limits are for ordinary builds: instrumented ones are several times slower.
    options = ["-p", "no:cacheprovider", "-q", "-o", "timeout=600"]
    command = [sys.executable, str(pytest_script()), *options, *tests]
    outcome = watch(kind, library, ROOT / "build" / kind / "reports", command)
    for report in outcome.reports:
        print(f"---\n{report}")
    print(f"sanitize.py: {kind}: {len(outcome.reports)} processes reported something")
    return 1 if outcome.reports or outcome.status else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
