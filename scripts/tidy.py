# SPDX-License-Identifier: Apache-2.0
"""The project's own rules on its sources: ``python -m scripts.tidy`` from the top folder.

A rule looks at one file, or at all of them, and yields a line for each breach. They are about
what no general checker knows: sizes, where memory orders and engines may be named, what mirrors
what. ``tests/test_tidy.py`` applies the same rules.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple, cast

from scripts.tidy_functions import functions
from scripts.tidy_tests import tests_assert_something, tests_mirror_sources
from scripts.tidy_waits import unbounded_waits

ROOT = Path(__file__).resolve().parent.parent
FILE_LINES_MAX = 500
FUNCTION_LINES_MAX = 70
LINE_COLUMNS_MAX = 100

CODE = (".py", ".pyi", ".pyx", ".pxd", ".pxi", ".c", ".h")
CYTHON = (".pyx", ".pxd", ".pxi")
OTHER_SOURCES = ("Makefile", ".ci/run", "pyproject.toml")
SPDX = "SPDX-License-Identifier: Apache-2.0"

MEMORY_ORDER = re.compile(r"__atomic_|__sync_|memory_order|\bvolatile\b|\._v\b|stdatomic")
MEMORY_ORDER_FILE = "kvbm/_fast/atomics.h"
# setup.py sets these for all modules; one set in a file would stay off in a debug build.
DIRECTIVE = re.compile(r"#\s*cython:.*(boundscheck|initializedcheck)|@cython\.(boundscheck|initi)")

# Libraries that may be missing: a file may import one if a part of its path has one of the words.
ABOUT = {
    "cuda": ("cuda",),
    "msgspec": ("msgspec", "zmq"),
    "nixl": ("nixl",),
    "nixl_cu12": ("nixl",),
    "nixl_cu13": ("nixl",),
    "sglang": ("sglang",),
    "tensorrt_llm": ("trtllm",),
    "torch": ("torch", "trtllm", "vllm"),
    "vllm": ("vllm",),
    "zmq": ("zmq",),
}

OURS = ("kvbm", "bench", "scripts")

UNFINISHED = re.compile(r"\b(?:T[O]DO|F[I]XME|X[X]X)\b")
SLEEP = re.compile(r"\btime\.slee[p]\b|from time import.*\bslee[p]\b")
MACHINE_PATH = re.compile(r"(?<![\w.}*])/(?:work|root|home/\w+|Users/\w+)/")
URL_HOST = re.compile(r"\bhttps?://(?P<host>[\w.-]+)")
URL_HOSTS = frozenset(
    {
        "127.0.0.1",
        "arxiv.org",
        "docs.vllm.ai",
        "github.com",
        "localhost",
        "www.apache.org",
        "www.w3.org",
    }
)


class Source(NamedTuple):
    """One tracked text file: its path from the top folder, with slashes, and its text."""

    path: str
    text: str

    @property
    def lines(self) -> list[str]:
        """The lines without their ends."""
        return self.text.splitlines()


FileRule = Callable[[Source], Iterator[str]]
TreeRule = Callable[[Sequence[Source]], Iterator[str]]


def is_source(source: Source) -> bool:
    """Return whether the rules on code apply to the file."""
    return source.path.endswith(CODE) or source.path in OTHER_SOURCES


def licence_line(source: Source) -> Iterator[str]:
    """Each source file begins with the licence line, after a ``#!`` line if it has one."""
    if is_source(source):
        lines = [line for line in source.lines[:2] if not line.startswith("#!")]
        if not lines or SPDX not in lines[0]:
            yield f"{source.path}:1: the first line must have {SPDX}"


def file_length(source: Source) -> Iterator[str]:
    """A file can be read in one sitting."""
    count = len(source.lines)
    if source.path.endswith(CODE) and count > FILE_LINES_MAX:
        yield f"{source.path}: {count} lines, at most {FILE_LINES_MAX} are allowed"


def function_length(source: Source) -> Iterator[str]:
    """A function fits on a screen."""
    for function in functions(source.path, source.text):
        if function.length > FUNCTION_LINES_MAX:
            yield (
                f"{source.path}:{function.line}: {function.name} has {function.length} lines, "
                f"at most {FUNCTION_LINES_MAX} are allowed"
            )


def line_length(source: Source) -> Iterator[str]:
    """Two files fit beside each other."""
    if is_source(source):
        for number, line in enumerate(source.lines, 1):
            if len(line) > LINE_COLUMNS_MAX:
                yield f"{source.path}:{number}: {len(line)} columns, allowed: {LINE_COLUMNS_MAX}"


def _matches(source: Source, pattern: re.Pattern[str], message: str) -> Iterator[str]:
    for number, line in enumerate(source.lines, 1):
        match = pattern.search(line)
        if match:
            yield f"{source.path}:{number}: {match[0]!r}: {message}"


def memory_orders(source: Source) -> Iterator[str]:
    """Memory orders are named in one file, so that the proof is in one place."""
    if source.path.endswith((*CYTHON, ".c", ".h")) and source.path != MEMORY_ORDER_FILE:
        yield from _matches(source, MEMORY_ORDER, f"allowed in {MEMORY_ORDER_FILE} only")


def no_local_directives(source: Source) -> Iterator[str]:
    """Checks that a debug build turns on are not turned off in a file."""
    if source.path.endswith(CYTHON):
        yield from _matches(source, DIRECTIVE, "setup.py sets this directive for all modules")


def unfinished_work(source: Source) -> Iterator[str]:
    """Nothing is left for later in the text."""
    yield from _matches(source, UNFINISHED, "finish it, or describe what is missing in the docs")


def no_sleep_in_tests(source: Source) -> Iterator[str]:
    """A test waits for a condition with a deadline (tests/leaks.py: wait_until)."""
    if source.path.startswith("tests/"):
        yield from _matches(source, SLEEP, "wait for a condition with a deadline")


def machine_paths(source: Source) -> Iterator[str]:
    """Nothing depends on the machine it was written on."""
    yield from _matches(source, MACHINE_PATH, "a path of one machine")


def url_hosts(source: Source) -> Iterator[str]:
    """Links go to known hosts; where packages come from is the user's configuration."""
    for number, line in enumerate(source.lines, 1):
        for match in URL_HOST.finditer(line):
            if source.path != "LICENSE" and match["host"] not in URL_HOSTS:
                yield f"{source.path}:{number}: a link to {match['host']}, which is not listed"


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _python_imports(node: ast.AST) -> Iterator[tuple[int, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((child.lineno, alias.name) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield child.lineno, "." * child.level + (child.module or "")
        elif _is_type_checking(child):
            yield from _python_imports(ast.Module(body=child.orelse, type_ignores=[]))
        else:
            yield from _python_imports(child)


CYTHON_IMPORT = re.compile(
    r"\s*(?:from\s+(?P<origin>[\w.]+)\s+c?import|c?import\s+(?P<names>[\w., ]+))"
)


def imports(source: Source) -> Iterator[tuple[int, str]]:
    """Find the modules that a Python or Cython file imports when it runs, with line numbers."""
    if source.path.endswith((".py", ".pyi")):
        yield from _python_imports(ast.parse(source.text))
    elif source.path.endswith(CYTHON):
        for number, line in enumerate(source.lines, 1):
            match = CYTHON_IMPORT.match(line)
            if match:
                names = match["origin"] or match["names"]
                yield from ((number, name.split()[0]) for name in names.split(","))


def fast_imports_only_fast(source: Source) -> Iterator[str]:
    """The compiled core knows nothing of the rest of the package."""
    if source.path.startswith("kvbm/_fast/"):
        for number, name in imports(source):
            inside = name == "kvbm._fast" or name.startswith("kvbm._fast.")
            if name.startswith("..") or (name.split(".")[0] == "kvbm" and not inside):
                yield f"{source.path}:{number}: kvbm/_fast must not import {name}"


def optional_imports(source: Source) -> Iterator[str]:
    """Engines and accelerator libraries are imported in the files that are about them."""
    if source.path.startswith("kvbm/"):
        for number, name in imports(source):
            words = ABOUT.get(name.split(".")[0])
            if words is not None and not any(word in source.path for word in words):
                yield (
                    f"{source.path}:{number}: imports {name}: allowed where the path has "
                    f"{' or '.join(words)}"
                )


def stubs_exist(sources: Sequence[Source]) -> Iterator[str]:
    """Each extension module has its types written beside it."""
    paths = {source.path for source in sources}
    for path in sorted(paths):
        stub = str(PurePosixPath(path).with_suffix(".pyi"))
        if path.startswith("kvbm/") and path.endswith(".pyx") and stub not in paths:
            yield f"{path}: {stub} is missing"


def mirrors(sources: Sequence[Source]) -> Iterator[str]:
    """A test file is found where its source is."""
    yield from tests_mirror_sources([source.path for source in sources])


def imports_exist(sources: Sequence[Source]) -> Iterator[str]:
    """What a file imports of the project is there, also where no test imports the file."""
    paths = [PurePosixPath(source.path) for source in sources]
    modules = {path.with_suffix("") for path in paths if path.suffix in (".py", *CYTHON)}
    modules |= {parent for module in modules for parent in module.parents}
    for source in sources:
        for number, name in imports(source):
            parts = name.split(".")
            if parts[0] in OURS and PurePosixPath(*parts) not in modules:
                yield f"{source.path}:{number}: imports {name}, which is not there"


def assertions(source: Source) -> Iterator[str]:
    """Each test can fail."""
    if source.path.startswith("tests/") and source.path.endswith(".py"):
        yield from tests_assert_something(source.path, source.text)


def waits(source: Source) -> Iterator[str]:
    """Nothing waits for what may never come."""
    if source.path.startswith("kvbm/") and source.path.endswith((".py", ".pyx")):
        yield from unbounded_waits(source.path, source.text)


FILE_RULES: tuple[FileRule, ...] = (
    licence_line,
    file_length,
    function_length,
    line_length,
    memory_orders,
    no_local_directives,
    unfinished_work,
    no_sleep_in_tests,
    machine_paths,
    url_hosts,
    fast_imports_only_fast,
    optional_imports,
    assertions,
    waits,
)
TREE_RULES: tuple[TreeRule, ...] = (stubs_exist, mirrors, imports_exist)


def breaches(rule: FileRule | TreeRule, sources: Sequence[Source]) -> list[str]:
    """Apply one rule to the sources; return a line for each breach."""
    if rule in TREE_RULES:
        return list(cast(TreeRule, rule)(sources))
    return [line for source in sources for line in cast(FileRule, rule)(source)]


def tracked_sources() -> list[Source]:
    """Return the text files that git tracks; without git, those that a source archive has."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        paths = [path for path in listed.stdout.split("\0") if path]
    else:
        found = (
            path
            for name in ("kvbm", "tests", "bench", "scripts")
            for path in ROOT.glob(f"{name}/**/*")
        )
        paths = sorted(str(path.relative_to(ROOT)) for path in found if path.suffix in CODE)
    sources = []
    for path in paths:
        try:
            sources.append(Source(path, (ROOT / path).read_text(encoding="utf-8")))
        except (FileNotFoundError, UnicodeDecodeError):
            continue  # deleted in the working tree, or not a text
    return sources


def main() -> int:
    """Print the breaches of all rules; return 1 if there are any."""
    sources = tracked_sources()
    rules: list[FileRule | TreeRule] = [*FILE_RULES, *TREE_RULES]
    found = [line for rule in rules for line in breaches(rule, sources)]
    print("\n".join([*found, f"{len(found)} breaches in {len(sources)} files"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
