# SPDX-License-Identifier: Apache-2.0
"""Build and import a test's .pyx, once for each state of the sources it depends on.

KVBM_CFLAGS has the flags of an instrumented run (scripts/sanitize.py).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCE = Path(__file__).with_name("_probe.pyx")


def _key(source: Path, package: Path) -> str:
    """Hash of everything that the built module depends on."""
    parts = [source, *sorted(package.glob("*.pxd")), *sorted(package.glob("*.h"))]
    state = hashlib.sha256(sys.version.encode() + os.environ.get("KVBM_CFLAGS", "").encode())
    for path in parts:
        state.update(path.read_bytes())
    return state.hexdigest()[:16]


def load_probe() -> ModuleType:
    """Return the functions of kvbm/_fast that have no Python API."""
    return load(SOURCE)


def load(source: Path) -> ModuleType:
    """Return the module; compiled if it is not there yet."""
    import kvbm._fast  # not by the process that compiles

    package = Path(next(iter(kvbm._fast.__path__)))
    folder = ROOT / "build" / "probe" / _key(source, package)
    if not list(folder.glob("*.so")):
        # In a process of its own: compilers' warnings are no failures here, and a sanitizer's
        # runtime has no business in the compiler.
        environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
        script = str(Path(__file__).resolve())
        command = [sys.executable, script, str(source), str(folder), str(package)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr
    library = next(iter(folder.glob("*.so")))
    spec = importlib.util.spec_from_file_location(source.stem, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(source: Path, folder: Path, package: Path) -> None:
    """Translate and compile the module into a folder, which appears when it is complete."""
    from Cython.Build import cythonize
    from setuptools import Distribution, Extension

    work = folder.with_name(f"{folder.name}.{os.getpid()}")
    flags = shlex.split(os.environ.get("KVBM_CFLAGS", ""))
    extension = Extension(
        source.stem,
        [str(source)],
        include_dirs=[str(package)],
        extra_compile_args=["-O1" if flags else "-O2", "-std=gnu11", *flags],
        extra_link_args=flags,
    )
    modules = cythonize(
        [extension],
        language_level=3,
        build_dir=str(work / "c"),
        include_path=[str(package.parent.parent)],
        compiler_directives={"binding": True, "cdivision": True, "wraparound": False},
    )
    command = Distribution({"ext_modules": modules}).get_command_obj("build_ext")
    command.build_lib = command.build_temp = str(work)
    command.ensure_finalized()
    command.run()
    try:
        work.rename(folder)
    except OSError:
        if not list(folder.glob("*.so")):  # else somebody was faster
            raise


if __name__ == "__main__":
    build(*(Path(argument) for argument in sys.argv[1:4]))
