# SPDX-License-Identifier: Apache-2.0
"""The build: what its switches refuse, and what ends up in a wheel."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SWITCHES = ("KVBM_DEBUG", "KVBM_SANITIZE", "KVBM_ANNOTATE", "KVBM_CFLAGS")


def run(*arguments: str, **switches: str) -> subprocess.CompletedProcess[str]:
    """Run a Python command in the checkout with these build switches and no others."""
    clean = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**clean, **switches}, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("KVBM_DEBUG", "yes", "0 or 1"),
        ("KVBM_ANNOTATE", "2", "0 or 1"),
        ("KVBM_SANITIZE", "memory", "thread, address, undefined"),
    ],
)
def test_a_wrong_switch_is_refused_with_what_is_allowed(
    name: str, value: str, allowed: str
) -> None:
    done = run("setup.py", "build_ext", "--inplace", **{name: value})
    assert done.returncode != 0
    assert f"{name}={value!r}" in done.stderr
    assert allowed in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_wheel_has_modules_stubs_and_headers_and_nothing_else(tmp_path: Path) -> None:
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(tmp_path)]
    done = run("-m", "pip", "wheel", *options, ".")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    for source in (ROOT / "kvbm" / "_fast").glob("*.pyx"):
        assert f"kvbm/_fast/{source.stem}{suffix}" in names
        assert f"kvbm/_fast/{source.stem}.pyi" in names
    for source in (ROOT / "kvbm" / "_fast").glob("*.[hp]*"):
        if source.suffix in (".h", ".pxd"):
            assert f"kvbm/_fast/{source.name}" in names
    assert {"kvbm/py.typed", "kvbm/inspect/page.html"} <= names
    assert {name.split("/")[0] for name in names} <= {"kvbm", wheel_information(names)}


def wheel_information(names: set[str]) -> str:
    """Return the name of the wheel's folder of metadata."""
    (folder,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("switch", [{"KVBM_DEBUG": "1"}, {"KVBM_SANITIZE": "thread"}])
def test_a_variant_never_replaces_the_normal_build(switch: dict[str, str]) -> None:
    built = sorted((ROOT / "kvbm" / "_fast").glob("*.so"))
    before = [(path, path.stat().st_mtime_ns) for path in built]
    done = run("setup.py", "build_ext", "--inplace", **switch)
    assert done.returncode != 0
    assert "would replace the normal build" in done.stderr
    assert [(path, path.stat().st_mtime_ns) for path in built] == before
