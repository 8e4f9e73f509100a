# SPDX-License-Identifier: Apache-2.0
"""The sources keep the project's rules, and each rule finds a breach where there is one."""

from __future__ import annotations

import subprocess
import sys

import pytest

from scripts import tidy
from scripts.tidy import Source, breaches

SOURCES = tidy.tracked_sources()
RULES = [*tidy.FILE_RULES, *tidy.TREE_RULES]
SPDX = f"# {tidy.SPDX}\n"
LONG_PYTHON = "def f():\n" + "    x = 1\n" * tidy.FUNCTION_LINES_MAX
LONG_CYTHON = (
    "cdef int f(int a,\n           int b) noexcept nogil:\n"
    + "    a = 1\n\n" * (tidy.FUNCTION_LINES_MAX // 2)
    + "cdef int g(): return 1\n"
)
DOCSTRING = '    """One line.\n\n' + "    More.\n" * 80 + '    """\n'
LONG_C = "static int f(int a)\n{\n" + "  a;\n" * tidy.FUNCTION_LINES_MAX + "}\n"

# A rule, and files of which each breaks it on exactly one line. Words that the rules look for are
# put together here, since this file is a source as well.
BREACHES = {
    tidy.licence_line: [
        ("kvbm/x.py", "import os\n"),
        ("kvbm/x.py", "\n" + SPDX),
        (".ci/run", "#!/bin/sh\nexit\n"),
        ("kvbm/empty.py", ""),
    ],
    tidy.file_length: [("kvbm/x.pyx", "\n" * (tidy.FILE_LINES_MAX + 1))],
    tidy.function_length: [
        ("kvbm/x.py", LONG_PYTHON),
        ("kvbm/x.py", "class A:\n    async " + LONG_PYTHON.replace("\n", "\n    ")),
        ("kvbm/x.pyx", LONG_CYTHON),
        ("kvbm/x.h", LONG_C),
    ],
    tidy.line_length: [
        ("kvbm/x.h", "x" * (tidy.LINE_COLUMNS_MAX + 1)),
        ("Makefile", "x" * (tidy.LINE_COLUMNS_MAX + 1)),
    ],
    tidy.memory_orders: [
        ("kvbm/_fast/x.pyx", "word.store(1, memory" + "_order)"),
        ("kvbm/_fast/x.h", "vola" + "tile int x;"),
        ("kvbm/_fast/x.pxd", "return word._" + "v"),
    ],
    tidy.no_local_directives: [
        ("kvbm/_fast/x.pyx", "# cython: wraparound=False, boundscheck=False"),
        ("kvbm/_fast/x.pyx", "@cython.boundscheck(False)"),
    ],
    tidy.unfinished_work: [("docs/x.md", "TO" + "DO: more"), ("kvbm/x.py", "# FIX" + "ME")],
    tidy.no_sleep_in_tests: [
        ("tests/test_x.py", "time.sle" + "ep(1)"),
        ("tests/test_x.py", "from time import monotonic, sle" + "ep"),
    ],
    tidy.machine_paths: [("README.md", "cd /wo" + "rk/main"), ("kvbm/x.py", "'/ho" + "me/joe/x'")],
    tidy.url_hosts: [("README.md", "see https:/" + "/registry.example.org/simple")],
    tidy.fast_imports_only_fast: [
        ("kvbm/_fast/x.pyx", "from kvbm.errors import KvbmError"),
        ("kvbm/_fast/x.pyx", "from .. import errors"),
        ("kvbm/_fast/x.pyx", "import numpy, kvbm.errors"),
        ("kvbm/_fast/x.py", "def f():\n    import kvbm"),
    ],
    tidy.optional_imports: [
        ("kvbm/leader.py", "import torch.cuda"),
        ("kvbm/leader.py", "def f():\n    from vllm.config import VllmConfig"),
        ("kvbm/leader.py", "if TYPE_CHECKING:\n    import os\nelse:\n    import nixl"),
        ("kvbm/transfer/cuda.py", "import nixl"),
    ],
    tidy.assertions: [
        ("tests/test_x.py", "def test_a():\n    f()"),
        ("tests/test_x.py", "class TestA:\n    async def test_a(self):\n        x = unchecked(1)"),
    ],
    tidy.waits: [("kvbm/x.py", "thread.join()\n"), ("kvbm/_fast/x.pyx", "    usleep(20)\n")],
    tidy.stubs_exist: [("kvbm/_fast/x.pyx", "")],
    tidy.mirrors: [
        ("tests/test_nothing.py", ""),
        ("tests/transfer/test_setup.py", ""),
        ("tests/fast/test_xx.py", ""),
    ],
    tidy.imports_exist: [
        ("bench/x.py", "from kvbm.nothing import x\nimport os.path\n"),
        ("kvbm/_fast/x.pyx", "from kvbm._fast.nothing cimport x\nfrom kvbm._fast cimport y\n"),
    ],
}

KEPT = {
    tidy.licence_line: [("kvbm/x.py", SPDX), (".ci/run", "#!/bin/sh\n" + SPDX), ("a.md", "text")],
    tidy.function_length: [
        ("kvbm/x.py", LONG_PYTHON.replace("    x = 1\n", "", 1)),
        ("kvbm/x.pyx", LONG_CYTHON.replace("    a = 1\n\n", "", 1)),
        ("kvbm/x.py", "def f():\n" + DOCSTRING + "    x = 1\n" * 60),
        ("kvbm/x.pyx", "def f(int a):\n" + DOCSTRING + "    x = 1\n" * 60),
        ("kvbm/x.pyx", "cdef class A(B):\n" + "    cdef int f(self): return 0\n" * 100),
        ("kvbm/x.pxd", "cdef int f(int a) noexcept nogil\n" + "cdef int x\n" * 100),
        ("kvbm/x.h", LONG_C.replace("  a;\n", "", 3)),
        ("kvbm/x.h", "typedef struct {\n" + "  int a;\n" * 100 + "} x;\n"),
    ],
    tidy.memory_orders: [(tidy.MEMORY_ORDER_FILE, "vola" + "tile"), ("docs/x.md", "vola" + "tile")],
    tidy.fast_imports_only_fast: [
        ("kvbm/_fast/x.pyx", "from kvbm._fast.index cimport find"),
        ("kvbm/_fast/x.pyx", "from kvbm._fast cimport index\nimport numpy\nfrom . import y"),
        ("kvbm/leader.py", "from kvbm.errors import KvbmError"),
    ],
    tidy.optional_imports: [
        ("kvbm/vllm_integration/connector.py", "import torch\nimport vllm"),
        ("kvbm/transfer/cuda.py", "from cuda.bindings import driver"),
        ("kvbm/leader.py", "if TYPE_CHECKING:\n    import torch"),
        ("tests/test_x.py", "import vllm"),
    ],
    tidy.assertions: [
        ("tests/test_x.py", "def test_a():\n    with pytest.raises(ValueError):\n        f()"),
        (
            "tests/test_x.py",
            "def test_a():\n    check_all(1)\ndef test_b():\n    a.assert_called()",
        ),
        ("tests/test_x.py", "def test_a():\n    for x in y:\n        assert x\ndef helper(): f()"),
    ],
    tidy.waits: [("kvbm/x.py", "thread.join(timeout=1)\n"), ("tests/x.py", "thread.join()\n")],
    tidy.url_hosts: [("README.md", "http://127.0.0.1:8000/x https://github.com/x")],
    tidy.machine_paths: [("README.md", "ls /dev/shm $HOME/work/ path/work/ /workspace/x")],
}


def cases(table: dict) -> list:
    """One parameter a file of the table, named by its rule."""
    return [
        pytest.param(rule, Source(*file), id=f"{rule.__name__}-{number}")
        for rule, files in table.items()
        for number, file in enumerate(files)
    ]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_sources_keep_the_rule(rule: tidy.FileRule | tidy.TreeRule) -> None:
    assert breaches(rule, SOURCES) == []


@pytest.mark.parametrize(("rule", "source"), cases(BREACHES))
def test_a_breach_is_found(rule: tidy.FileRule | tidy.TreeRule, source: Source) -> None:
    assert len(breaches(rule, [source, Source("kvbm/other.py", SPDX)])) == 1


@pytest.mark.parametrize(("rule", "source"), cases(KEPT))
def test_what_keeps_the_rule_is_not_reported(
    rule: tidy.FileRule | tidy.TreeRule, source: Source
) -> None:
    assert breaches(rule, [source]) == []


def test_each_rule_has_a_breach_that_shows_it_can_fail() -> None:
    assert set(BREACHES) == set(RULES)


@pytest.mark.parametrize(
    ("source", "test"),
    [
        ("kvbm/leader/leader.py", "tests/leader/test_leader.py"),
        ("kvbm/leader/leader.py", "tests/leader/test_leader_recovery.py"),
        ("kvbm/_fast/index.pyx", "tests/fast/test_index.py"),
        ("kvbm/transfer/host.py", "tests/transfer/test_host.py"),
        ("kvbm/inspect/__init__.py", "tests/test_inspect.py"),
        ("bench/demo.py", "tests/bench/test_demo.py"),
        ("scripts/lint.py", "tests/test_lint.py"),
        ("setup.py", "tests/test_setup.py"),
        ("tests/leaks.py", "tests/test_leaks.py"),
    ],
)
def test_a_test_is_accepted_where_its_source_says(source: str, test: str) -> None:
    assert breaches(tidy.mirrors, [Source(source, ""), Source(test, "")]) == []
    assert len(breaches(tidy.mirrors, [Source(test, "")])) == 1


def test_the_sources_are_found() -> None:
    paths = {source.path for source in SOURCES}
    assert {"setup.py", "tests/test_tidy.py", "scripts/tidy.py", "kvbm/_fast/atomics.h"} <= paths


def test_the_package_imports_without_engines_and_accelerator_libraries() -> None:
    code = f"""
import importlib, pkgutil, sys

MISSING = {tidy.ABOUT!r}

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in MISSING:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
import kvbm
words = [word for found in MISSING.values() for word in found]
for module in pkgutil.walk_packages(kvbm.__path__, "kvbm."):
    about = any(word in module.name for word in words)
    if not about and not module.name.endswith("__main__"):
        importlib.import_module(module.name)
        print(module.name)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tidy.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "kvbm.errors" in done.stdout.split()
