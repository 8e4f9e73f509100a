# SPDX-License-Identifier: Apache-2.0
"""Extension modules of kvbm: every ``kvbm/_fast/*.pyx`` becomes ``kvbm._fast.<name>``.

Everything else about the package is in pyproject.toml. Environment variables that change the build:

KVBM_CFLAGS
    Extra compiler flags, appended to the default ones.
KVBM_DEBUG=1
    No optimisation, bounds checks, line numbers of the .pyx in the C code, macro ``KVBM_DEBUG``.
KVBM_SANITIZE=thread|address|undefined
    Instrumented build; ``address`` implies ``undefined``.
KVBM_ANNOTATE=1
    Cython's annotated HTML beside the generated C.

A debug or sanitized build goes to ``build/<variant>/lib`` (``python setup.py build``), a complete
package to be put first on ``PYTHONPATH``, so that it never replaces the normal build.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FAST = Path("kvbm", "_fast")
SANITIZERS = {"thread": "thread", "address": "address,undefined", "undefined": "undefined"}
WARNINGS = [
    "-Wall",
    "-Wextra",
    "-Wno-unused-function",
    "-Wno-unused-parameter",
    "-Wno-sign-compare",  # Cython compares its loop variables with enumerators
]


def switch(name: str) -> bool:
    """Return whether the environment variable ``name`` is set to 1; unset, empty or 0 is off."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        sys.exit(f"setup.py: {name}={value!r} is not allowed: use 0 or 1")
    return value == "1"


def sanitizer() -> str:
    """Return the value of KVBM_SANITIZE, an empty string if there is none."""
    value = os.environ.get("KVBM_SANITIZE", "")
    if value and value not in SANITIZERS:
        allowed = ", ".join(SANITIZERS)
        sys.exit(f"setup.py: KVBM_SANITIZE={value!r} is not allowed: use one of {allowed}")
    return value


DEBUG = switch("KVBM_DEBUG")
SANITIZE = sanitizer()
VARIANT = "-".join(([SANITIZE] if SANITIZE else []) + (["debug"] if DEBUG else []))
BUILD_BASE = Path("build", VARIANT)
LIBRARY = str(BUILD_BASE / "lib")


def compile_args() -> list[str]:
    """Return the compiler flags of every extension."""
    args = ["-O0", "-g"] if DEBUG else ["-O1"] if SANITIZE else ["-O2"]
    args += ["-std=gnu11", "-fvisibility=hidden", *WARNINGS]
    if SANITIZE:
        args += [f"-fsanitize={SANITIZERS[SANITIZE]}", "-fno-omit-frame-pointer", "-g"]
    return args + shlex.split(os.environ.get("KVBM_CFLAGS", ""))


def extensions() -> list[Extension]:
    """Return the extensions, translated to C."""
    from Cython.Build import cythonize

    # A changed contract header must rebuild every module: setuptools compares these timestamps.
    depends = sorted(str(path) for pattern in ("*.h", "*.pxd") for path in FAST.glob(pattern))
    modules = [
        Extension(
            f"kvbm._fast.{source.stem}",
            [str(source)],
            include_dirs=[str(FAST)],
            define_macros=[("KVBM_DEBUG", "1")] if DEBUG else [],
            extra_compile_args=compile_args(),
            extra_link_args=[f"-fsanitize={SANITIZERS[SANITIZE]}"] if SANITIZE else [],
            depends=depends,
            language="c",
        )
        for source in sorted(FAST.glob("*.pyx"))
    ]
    return cythonize(
        modules,
        language_level=3,
        build_dir=str(BUILD_BASE / "cython"),
        annotate=switch("KVBM_ANNOTATE"),
        emit_linenums=DEBUG or bool(SANITIZE),
        compiler_directives={
            "binding": True,
            "boundscheck": DEBUG,
            "initializedcheck": DEBUG,
            # These two change the meaning of an expression, so they are the same in each variant.
            "wraparound": False,
            "cdivision": True,
            "embedsignature": False,
        },
    )


class BuildExt(build_ext):
    """The ordinary build_ext, which refuses to put a variant where the normal build lives."""

    def finalize_options(self) -> None:
        """Complete the options; end the build where the normal one would be overwritten."""
        super().finalize_options()
        if VARIANT and (self.inplace or self.editable_mode):
            sys.exit(
                f"setup.py: an in-place build of the {VARIANT} variant would replace the normal "
                f"build: use 'python setup.py build', which writes {LIBRARY}"
            )


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExt},
    options={
        "build_ext": {"parallel": min(4, os.cpu_count() or 1)},
        # The normal build keeps setuptools' folders, which are one a version of Python.
        **({"build": {"build_base": str(BUILD_BASE), "build_lib": LIBRARY}} if VARIANT else {}),
    },
)
