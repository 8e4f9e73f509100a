# SPDX-License-Identifier: Apache-2.0
"""Run the checkers on the sources: ``python scripts/lint.py [name ...]``, all of them by default.

The commands are listed here once; ``tests/test_lint.py`` runs the same ones.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FAST = ROOT / "kvbm" / "_fast"
PYTHON_PATHS = ("kvbm", "tests", "bench", "scripts", "setup.py")
# Not tests/, where wrong spellings are inputs.
TEXT_PATHS = ("kvbm", "bench", "scripts", "docs", "README.md", "CHANGELOG.md", "Makefile")


def existing(paths: tuple[str, ...]) -> list[str]:
    """Return those of the paths that the checkout has."""
    return [path for path in paths if (ROOT / path).exists()]


def ruff_check() -> list[str]:
    """Style and likely mistakes in the Python sources and the stubs."""
    return [sys.executable, "-m", "ruff", "check", "--quiet", *existing(PYTHON_PATHS)]


def ruff_format() -> list[str]:
    """Formatting of the Python sources and the stubs."""
    return [sys.executable, "-m", "ruff", "format", "--check", *existing(PYTHON_PATHS)]


def mypy() -> list[str]:
    """Types of the package, strict (configured in pyproject.toml)."""
    return [sys.executable, "-m", "mypy", "kvbm"]


def stubtest() -> list[str]:
    """The stubs of the extension modules against what the built modules really have."""
    modules = [f"kvbm._fast.{path.stem}" for path in sorted(FAST.glob("*.pyx"))]
    allow = str(ROOT / "scripts" / "stubtest_allow.txt")
    config = str(ROOT / "pyproject.toml")  # what it says of modules without types
    options = ["--ignore-unused-allowlist", "--allowlist", allow, "--mypy-config-file", config]
    return [sys.executable, "-m", "mypy.stubtest", *options, *modules]


def cython_lint() -> list[str]:
    """Style and unused names in the Cython sources."""
    script = Path(sys.executable).parent / "cython-lint"
    sources = [*FAST.glob("*.pyx"), *FAST.glob("*.pxd")]
    return [str(script), *sorted(str(path) for path in sources)]


def codespell() -> list[str]:
    """Frequent misspellings in sources and documentation."""
    return [str(Path(sys.executable).parent / "codespell"), *existing(TEXT_PATHS)]


def tidy() -> list[str]:
    """The project's own rules."""
    return [sys.executable, "-m", "scripts.tidy"]


CHECKS: dict[str, Callable[[], list[str]]] = {
    "ruff-check": ruff_check,
    "ruff-format": ruff_format,
    "mypy": mypy,
    "stubtest": stubtest,
    "cython-lint": cython_lint,
    "codespell": codespell,
    "tidy": tidy,
}


def run(name: str) -> tuple[int, str]:
    """Run one check.

    Returns
    -------
    tuple of int and str
        The exit status and what the checker printed.
    """
    # stubtest imports the modules: from the checkout, where the in-place build is.
    # cython-lint calls pycodestyle by name: the one of this environment, activated or not.
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": tools}
    done = subprocess.run(
        CHECKS[name](),
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.returncode, done.stdout


def main(names: list[str]) -> int:
    """Run the named checks, print what they say, return 1 if one has found something."""
    unknown = sorted(set(names) - set(CHECKS))
    if unknown:
        print(f"lint.py: no check named {', '.join(unknown)}: there are {', '.join(CHECKS)}")
        return 2
    failed = []
    for name in names or CHECKS:
        status, output = run(name)
        print(f"{name}: {'ok' if status == 0 else 'FAILED'}", flush=True)
        if status != 0:
            print(output, flush=True)
            failed.append(name)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
