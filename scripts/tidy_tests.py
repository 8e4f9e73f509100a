# SPDX-License-Identifier: Apache-2.0
"""Rules on the tests: each can fail, and each is found where its source is."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

# Suites about properties of the whole, with no single source.
SUITES = ("tests/e2e/", "tests/gpu/", "tests/model/", "tests/stress/")
CHECKER = re.compile(r"_*(?:assert|check|expect|verify)(?:_|$)")
RAISING = frozenset({"raises", "warns", "fail"})
SOURCES = re.compile(r"(?:kvbm|bench|scripts|tests)/.*\.(?:py|pyx)|setup\.py")


def _can_fail(node: ast.AST) -> bool:
    """Return whether a statement or call below the node fails when a property does not hold."""
    for child in ast.walk(node):
        if isinstance(child, ast.Assert):
            return True
        if isinstance(child, ast.Call):
            called = child.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            if CHECKER.match(name) or name in RAISING:
                return True
    return False


def tests_assert_something(path: str, text: str) -> Iterator[str]:
    """Find the test functions that contain no assert, no ``raises`` and no call of a checker.

    A checker is a function whose name begins with assert, check, expect or verify.
    """
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if node.name.startswith("test_") and not _can_fail(node):
                yield f"{path}:{node.lineno}: {node.name} asserts nothing"


def _module_names(path: str) -> Iterator[str]:
    """Yield the places, from tests/ and without ``test_``, where the tests of a source may be."""
    pure = PurePosixPath(path)
    parts = [part.lstrip("_") for part in pure.with_suffix("").parts]
    if pure.name == "__init__.py":
        parts = parts[:-1]
    top, inner = parts[0], parts[1:]
    if top == "kvbm":
        yield "/".join(inner or [top])
    elif top == "bench":
        yield "/".join(parts)
    else:
        yield "/".join(inner or [top])


def tests_mirror_sources(paths: Sequence[str]) -> Iterator[str]:
    """Find the test files without a source of that place and name.

    ``tests/fast/test_index.py`` is about ``kvbm/_fast/index.pyx``; so is
    ``tests/fast/test_index_bisection.py``, which tells one property of it apart.
    ``tests/bench/`` mirrors ``bench/``; scripts, setup.py and the helpers of the tests have
    theirs in ``tests/`` itself.
    """
    places = {place for path in paths if SOURCES.fullmatch(path) for place in _module_names(path)}
    for path in paths:
        pure = PurePosixPath(path)
        if not path.startswith("tests/") or path.startswith(SUITES):
            continue
        if not (pure.name.startswith("test_") and pure.suffix == ".py"):
            continue
        folder = "/".join(pure.parts[1:-1])
        words = pure.stem.removeprefix("test_").split("_")
        names = ("_".join(words[:count]) for count in range(len(words), 0, -1))
        if not any(f"{folder}/{name}".lstrip("/") in places for name in names):
            yield f"{path}: there is no source for it to mirror"
